"""The form of an experiment config: what `fit` takes, and what every verb that reads a whole config understands."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any, Optional

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mhe_lightning.callbacks import (
    AverageCheckpoints,
    Checkpoints,
    LossGuard,
    MemoryTimeline,
    Profile,
    Samples,
    StepTimes,
    Watchdog,
)
from mhe_lightning.parsing import Parser
from mhe_lightning.run import OBSERVING
from mhe_lightning.tasks import Task

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs",
    "use_distributed_sampler": False,  # the data modules shard exactly; Lightning's sampler would pad and reorder
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,  # training data have no end, so validation counts batches
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # its FLOPs and layer counts say little; we print parameters by part
}

LINKED = ("problem", "n_labels", "n_spans", "metrics", "unanswerable", "tokenizer", "end_token")
"""What a task takes from the data, of finetuning and translation; skipped where a task has no such argument."""


class ExperimentCLI(LightningCLI):
    """LightningCLI with the options of an experiment."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            Task,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=1,
            auto_configure_optimizers=False,
            parser_class=Parser,
            trainer_defaults=TRAINER_DEFAULTS,
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str, default="run", help="Name of the run: its folder in trainer.default_root_dir."
        )
        parser.add_argument(
            "--init_from",
            type=Optional[str],  # noqa: UP045 - jsonargparse on Python 3.10
            help="Begin `fit` with the net of this run directory (its newest checkpoint) or checkpoint file, and with "
            "its tokenizer, where data.tokenizer is not set.",
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(LossGuard, "guard")
        parser.add_lightning_class_args(AverageCheckpoints, "averaging")
        parser.add_lightning_class_args(Samples, "samples")
        for name, callback in zip(OBSERVING, (StepTimes, MemoryTimeline, Profile, Watchdog), strict=True):
            parser.add_lightning_class_args(callback, name)
        parser.link_arguments("data.vocab_size", "model.init_args.net.init_args.vocab_size", apply_on="instantiate")
        for name in LINKED:
            # not "data.<name>": where it is missing, jsonargparse prints the data module, which makes its loaders
            take = partial(attribute, name=name)
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=take, apply_on="instantiate")
        parser.link_arguments("trainer.max_steps", "model.init_args.max_steps")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("checkpoints.keep", "averaging.keep")


class Experiments(ExperimentCLI):
    """Reads experiments without building anything; its parser is made once for many of them."""

    def __init__(self) -> None:
        super().__init__(run=False, args=[])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = Namespace()

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """Nothing is built."""

    def parse(self, args: Sequence[str]) -> Namespace:
        """The experiment that `fit` would run with these arguments.

        Raises:
            UserError: an option is unknown or its value refused.
        """
        parser = self.parser
        # of `fit` alone, but harmless to whoever only reads the config
        config: Namespace = parser.parse_args([*args])
        return config

    def text(self, config: Namespace) -> str:
        """The experiment as YAML, resolved, as `fit` keeps it in ``config.yaml``."""
        text: str = self.parser.dump(config, skip_unset=False, skip_link_targets=True)
        return text


def attribute(data: LightningDataModule, name: str) -> Any:
    """``data.name``, or None where a data module has none."""
    return getattr(data, name, None)


def class_of(path: str) -> type:
    """The class that a config names by its dotted path."""
    module, _, name = path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found
