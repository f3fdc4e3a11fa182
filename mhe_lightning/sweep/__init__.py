"""Variants × seeds × a grid of one experiment: which runs these are, and training and scoring them one by one.

1. `make_runs` lists the runs, each with the arguments of its `fit`.
2. `claim` makes the root's ``sweep.json``, or refuses a root that holds another sweep.
3. `train` trains the runs that are not finished, each in a process of its own, going on from its newest checkpoint.
4. `choose` takes each attention's best point of the grid, by validation.
5. `score` tests these.

Every step looks at what is on disk, so the same call goes on with a sweep that was killed.
"""

from mhe_lightning.sweep.configs import Config, check_beginning, check_config, refuse_other_run, resolve, task_of
from mhe_lightning.sweep.manifest import MANIFEST, claim, read_manifest, record_choice, write_manifest
from mhe_lightning.sweep.options import parse_grid
from mhe_lightning.sweep.outcomes import begin_from, best_point, choose, is_finished, state_of
from mhe_lightning.sweep.processes import Children, Stopped
from mhe_lightning.sweep.runs import CHECKPOINTS, Run, Sweep, make_runs
from mhe_lightning.sweep.slurm import slurm_script
from mhe_lightning.sweep.training import Launch, Numbered, duration, numbered, score, train

__all__ = [
    "CHECKPOINTS",
    "MANIFEST",
    "Children",
    "Config",
    "Launch",
    "Numbered",
    "Run",
    "Stopped",
    "Sweep",
    "begin_from",
    "best_point",
    "check_beginning",
    "check_config",
    "choose",
    "claim",
    "duration",
    "is_finished",
    "make_runs",
    "numbered",
    "parse_grid",
    "read_manifest",
    "record_choice",
    "refuse_other_run",
    "resolve",
    "score",
    "slurm_script",
    "state_of",
    "task_of",
    "train",
    "write_manifest",
]
