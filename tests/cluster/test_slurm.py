"""The job file on a real SLURM controller with two nodes, all on this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REHEARSAL = ROOT / "docker/slurm/rehearse.py"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("slurmctld", path="/usr/sbin:/usr/bin") is None, reason="slurmctld is not installed")
def test_a_job_on_two_nodes_that_is_sent_usr1_is_requeued_and_ends_as_an_undisturbed_one():
    done = subprocess.run(
        [sys.executable, str(REHEARSAL), "--trainer.max_steps", "30", "--trainer.val_check_interval", "30"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "COMPLETED, restarted 1 times" in done.stdout
    assert "all 30 agree" in done.stdout


def test_a_rehearsal_without_slurm_names_what_is_missing():
    command = [sys.executable, str(REHEARSAL)]
    done = subprocess.run(command, env={"PATH": "/nowhere"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "apt-get install slurm-wlm munge" in done.stderr
