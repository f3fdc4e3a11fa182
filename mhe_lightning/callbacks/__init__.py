"""Callbacks that the command line adds to every run."""

from mhe_lightning.callbacks.average import AverageCheckpoints
from mhe_lightning.callbacks.checkpoints import Checkpoints
from mhe_lightning.callbacks.chrome_trace import Profile
from mhe_lightning.callbacks.exact_resume import ExactResume
from mhe_lightning.callbacks.logs import RankLogs
from mhe_lightning.callbacks.loss_guard import LossGuard
from mhe_lightning.callbacks.memory_timeline import MemoryTimeline
from mhe_lightning.callbacks.metrics_csv import MetricsCSV
from mhe_lightning.callbacks.predictions import Predictions
from mhe_lightning.callbacks.progress import PlainProgress
from mhe_lightning.callbacks.run_record import RunRecord
from mhe_lightning.callbacks.samples import Samples
from mhe_lightning.callbacks.step_times import StepTimes
from mhe_lightning.callbacks.throughput import Throughput
from mhe_lightning.callbacks.watchdog import Watchdog

__all__ = [
    "AverageCheckpoints",
    "Checkpoints",
    "ExactResume",
    "LossGuard",
    "MemoryTimeline",
    "MetricsCSV",
    "PlainProgress",
    "Predictions",
    "Profile",
    "RankLogs",
    "RunRecord",
    "Samples",
    "StepTimes",
    "Throughput",
    "Watchdog",
]
