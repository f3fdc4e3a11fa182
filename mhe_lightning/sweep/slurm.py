"""A sweep as an array of SLURM jobs."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def slurm_script(arguments: Sequence[str], *, root: Path, n_runs: int, folder: Path) -> str:
    """A shell script that submits a sweep: an array of one task per run, and a job that scores when all have ended.

    Args:
        arguments: of `sweep`, without ``--slurm``.
        root: the folder of all runs.
        n_runs: how many there are.
        folder: the working directory of the jobs.
    """
    sweep = shlex.join([sys.executable, "-m", "mhe_lightning", "sweep", *arguments])
    logs = (folder / root).resolve()
    name = re.sub(r"[^\w.-]+", "_", root.name) or "sweep"
    return f"""\
#!/bin/bash
# Submits the sweep: {n_runs} runs, a task each, and a job that scores them. Run it with bash.
# Submitted again after a failure, it goes on where the runs are.
set -euo pipefail
cd {shlex.quote(str(folder))}
mkdir -p {shlex.quote(str(logs))}

# What each task gets. Change it to fit, such as with --gres=gpu:1 or --partition=...
resources=(--nodes=1 --ntasks=1 --cpus-per-task=4 --mem=16G --time=24:00:00)

# The signal comes before the time is over: the last step is saved, and the task is queued again to go on.
fits=$(sbatch --parsable "${{resources[@]}}" --job-name={name} --array=1-{n_runs} \\
    --requeue --open-mode=append --signal=B:USR1@120 --output={shlex.quote(str(logs / "slurm-%A_%a.out"))} <<'END'
#!/bin/bash
exec {sweep} --task "$SLURM_ARRAY_TASK_ID"
END
)

sbatch "${{resources[@]}}" --job-name={name}-score --dependency="afterok:${{fits%%;*}}" --kill-on-invalid-dep=yes \\
    --requeue --signal=B:TERM@120 --output={shlex.quote(str(logs / "slurm-%j.out"))} <<'END'
#!/bin/bash
exec {sweep}
END
"""
