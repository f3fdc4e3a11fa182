"""`fit`, `validate`, `test` and `predict`: LightningCLI over the run directory."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from mhe_lightning import run
from mhe_lightning.accounting import parameters_by_part
from mhe_lightning.callbacks import (
    ExactResume,
    MetricsCSV,
    PlainProgress,
    Predictions,
    RankLogs,
    RunRecord,
    Throughput,
)
from mhe_lightning.callbacks.predictions import PREDICTIONS, SUBMISSION
from mhe_lightning.checkpoint import (
    RECORD,
    TOKENIZER_HASH,
    AtomicCheckpointIO,
    config_of,
    read_record,
    run_of,
)
from mhe_lightning.data import ExactDataModule
from mhe_lightning.data.loading import dead_worker
from mhe_lightning.data.tokenizer import tokenizer_hash
from mhe_lightning.deferred import Deferred
from mhe_lightning.errors import RunError, UserError
from mhe_lightning.experiment import ExperimentCLI, class_of
from mhe_lightning.files import write_text
from mhe_lightning.parsing import as_user_error, data_module
from mhe_lightning.pretrained import load_pretrained, take_tokenizer
from mhe_lightning.signals import END_SIGNALS, requeue, take_over
from mhe_lightning.strategies import Sharded
from mhe_lightning.tracing import forward_flops_per_token


def main(verb: str, args: list[str]) -> None:
    _quieten()
    try:
        with ExitStack() as held:
            if verb == "fit":
                held.enter_context(END_SIGNALS.listening())
            try:
                TrainCLI(verb, args, held)
            except SIGTERMException:
                what = "the last step is saved" if END_SIGNALS.training else "no step was taken"
                print(f"terminated: {what}; go on with --ckpt_path auto", file=sys.stderr)
                # still listening: another rank may have ended, for which srun sends SIGTERM to this one
                if _rank() == 0 and (answer := requeue()) is not None:
                    print(answer, file=sys.stderr)
                sys.exit(143)  # as SIGTERM's; Lightning's own code is 0, which a scheduler takes for "finished"
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits with 1
            raise KeyboardInterrupt from error
        raise
    except (MisconfigurationException, ValueError, RuntimeError, ModuleNotFoundError) as error:
        if told := dead_worker(error):
            raise RunError(f"rank {_rank()}: {told}") from error
        raise as_user_error(error) or error from error


class TrainCLI(ExperimentCLI):
    """One run: parses the config, prepares missing data, builds everything, and keeps the run directory.

    Args:
        verb: "fit", "validate", "test" or "predict".
        args: what follows the verb on the command line.
        held: takes what must be released when the verb has ended.
    """

    def __init__(self, verb: str, args: list[str], held: ExitStack) -> None:
        self._held = held
        sys.argv[1:] = [verb, *args]  # Lightning launches the other processes of a host with this command line
        super().__init__()

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        for verb, parser in self._subcommand_parsers.items():
            action = next(action for action in parser._actions if action.dest == "ckpt_path")
            action.help = (
                "A checkpoint file to go on from; 'auto' for the newest complete one of the run, if there is one."
                if verb == "fit"
                else "A checkpoint file; 'auto', 'best' or 'averaged' for the run's newest, best or averaged one."
            )

    # Before anything is built

    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand]
        _check_trainer(options.trainer)
        self.folder = run.folder_of(options.trainer.default_root_dir, options.name)
        options.ckpt_path = run.resolve_checkpoint(options.ckpt_path, self.folder)
        if self.subcommand != "fit" and options.ckpt_path is None:
            raise UserError(
                f"{self.subcommand} needs a trained model: give --ckpt_path, a file, or 'auto', 'best' or 'averaged' "
                f"for the newest, the best or the averaged checkpoint in {self.folder}"
            )
        begins_with = options.ckpt_path or (options.init_from if self.subcommand == "fit" else None)
        take_tokenizer(options.data.init_args, begins_with)
        self._prepare_data(options)
        self._compare_with_checkpoint(options)

    def instantiate_classes(self) -> None:
        """Where a model is sharded, no process builds all of it: each fills its part when it is laid out."""
        options = self.config[self.subcommand]
        deferred = Deferred() if _is_sharded(options.trainer.strategy) and not self._begins_with_weights else None
        if deferred is not None:
            self._parser(self.subcommand).add_instantiator(_without_memory, nn.Module, subclasses=True)
        with nullcontext() if deferred is None else deferred.recording():
            super().instantiate_classes()
        self.model.deferred = deferred

    @property
    def _begins_with_weights(self) -> bool:
        options = self.config[self.subcommand]
        return self.subcommand == "fit" and options.init_from is not None and options.ckpt_path is None

    def _parse_ckpt_path(self) -> None:
        """Lightning's reads hyperparameters from the file, before anyone has checked it. Ours hold a config."""

    def _prepare_data(self, options: Namespace) -> None:
        """Make missing data, but never in a group of processes, where the others would time out waiting."""
        data = data_module(options.data)
        if not isinstance(data, ExactDataModule) or data.prepared:
            return
        if _launched_processes() > 1:
            raise UserError(
                "the data are not prepared, which takes one process; run `python train.py prepare` with the same "
                "--config and data options first"
            )
        data.prepare()

    def _compare_with_checkpoint(self, options: Namespace) -> None:
        """The command line wins over the checkpoint; say where they differ. Refuse to train on from weights alone."""
        if options.ckpt_path is None or _rank() != 0:
            return
        checkpoint = read_record(Path(options.ckpt_path))
        if self.subcommand == "fit" and "optimizer_states" not in checkpoint:
            raise UserError(
                f"{options.ckpt_path} holds weights but no optimizer state, so `fit` cannot go on from it; "
                f"begin a new run with --init_from {options.ckpt_path}"
            )
        old = config_of(checkpoint)
        new = yaml.safe_load(self._config_text())
        for key in ("config", "ckpt_path", "name", "init_from", "verbose", *run.OBSERVING):
            old.pop(key, None)
            new.pop(key, None)
        for config in (old, new):  # the tokenizers themselves are compared, not where they lie
            config.get("data", {}).get("init_args", {}).pop("tokenizer", None)
        for key, before, after in run.differences(old, new):
            print(f"{key}: {before} in the checkpoint, {after} now", flush=True)

    def _config_text(self) -> str:
        parser = self._parser(self.subcommand)
        options = self.config[self.subcommand].clone()
        options.ckpt_path = None  # where this process began is no property of the experiment
        text: str = parser.dump(options, skip_unset=False, skip_link_targets=True)
        return text

    # The trainer

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config_init[self.subcommand].trainer
        logger = options.logger
        if self.subcommand != "fit":
            logger = False  # what they find goes to results.json; the curves are the training's
        elif logger in (None, True):
            logger = TensorBoardLogger(self.folder, name="", version="", sub_dir="tensorboard")
        kwargs["plugins"] = [*(options.plugins or []), AtomicCheckpointIO()]
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():  # torchrun may run inside a job
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))  # its signals are ours
        if not (sys.stdout.isatty() and sys.stderr.isatty()):
            kwargs["enable_progress_bar"] = False  # plain lines instead
        elif options.enable_progress_bar is not False:
            # the default bar shows "Epoch 0/-2" for training that ends at a step; to show a loss, a GPU is waited for
            refresh_rate = (options.log_every_n_steps or 50) if torch.cuda.is_available() else 1
            kwargs["callbacks"] = [*(options.callbacks or []), TQDMProgressBar(refresh_rate)]
        trainer = super().instantiate_trainer(default_root_dir=str(self.folder), logger=logger, **kwargs)
        if self.subcommand == "fit":
            take_over(trainer)
        seed = int(self.config[self.subcommand].seed_everything)
        throughput = Throughput(self._training_flops_per_token() if self.subcommand == "fit" else None)
        observers = [self.config_init[self.subcommand][name] for name in run.OBSERVING]
        for observer in observers:  # they go before those that write what they log
            trainer.callbacks.remove(observer)  # type: ignore[attr-defined]
        record = RunRecord(self._config_text(), seed, throughput)
        added = [RankLogs(), ExactResume(seed), throughput, *observers, record, Predictions()]
        if self.subcommand == "fit":
            added.append(MetricsCSV(self.folder))  # after Throughput, whose metric it writes
        if trainer.progress_bar_callback is None and options.enable_progress_bar is not False:
            added.append(PlainProgress())
        # Checkpoints, which Lightning keeps last, must see what the others did with a batch
        trainer.callbacks[:0] = added  # type: ignore[attr-defined]
        return trainer

    def _training_flops_per_token(self) -> float | None:
        """Three times the forward pass's over a whole row, as `plan` counts them; None where they cannot be counted."""
        if not isinstance(self.datamodule, ExactDataModule):
            return None
        try:
            return 3 * forward_flops_per_token(self.model, self.datamodule.largest_row())
        except Exception as error:  # a step may need what is set up later: training does without the number
            rank_zero_info(f"no mfu: the operations of a step cannot be counted before it begins: {error!r}")
            return None

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    # Around the verbs

    def before_fit(self) -> None:
        self._check_run()
        options = self.config[self.subcommand]
        begun = None
        if self._begins_with_weights:
            begun = load_pretrained(
                self.model,
                run_of(Path(options.init_from))[1],
                net_spec=yaml.safe_load(self._config_text())["model"]["init_args"]["net"],
                tokenizer_sha256=_tokenizer_sha256(self.datamodule),
            )
        if _rank() == 0:
            self._claim(options.ckpt_path)
            if begun is not None:
                print(begun, flush=True)
            parts = parameters_by_part(self.model)
            print(", ".join(f"{count:,} {part.replace('_', ' ')}" for part, count in parts.items() if count))
            tokenizer = getattr(self.datamodule, "tokenizer", None)
            if tokenizer is not None and not (self.folder / run.TOKENIZER).is_file():
                write_text(self.folder / run.TOKENIZER, tokenizer.to_str())

    def _check_run(self) -> None:
        """Find out what cannot train before an earlier run is set aside for it."""
        if isinstance(self.trainer.strategy, Sharded):
            _ = self.trainer.strategy.sizes
        positions = getattr(self.model.net, "max_length", None)
        for name in ("block_length", "max_length"):
            length = getattr(self.datamodule, name, None)
            if length is not None and positions is not None and length > positions:
                raise UserError(
                    f"data.{name} ({length}) is more than the model's positions, model.net.max_length ({positions}); "
                    "lower the one or raise the other"
                )
        if isinstance(self.datamodule, ExactDataModule):
            self.datamodule.dataset("train")
            self.datamodule.dataset("validation")
        given = _tokenizer_sha256(self.datamodule)
        if given is not None:
            self.model.check_tokenizer(given)

    def before_validate(self) -> None:
        self._check_tokenizer()

    def before_test(self) -> None:
        self._check_tokenizer()

    def before_predict(self) -> None:
        self._check_tokenizer()

    def _check_tokenizer(self) -> None:
        path = self.config[self.subcommand].ckpt_path
        trained, given = read_record(Path(path))[RECORD].get(TOKENIZER_HASH), _tokenizer_sha256(self.datamodule)
        if trained is not None and given is not None and trained != given:
            raise UserError(
                f"{path} was trained with the tokenizer {trained[:12]}…, the data have {given[:12]}…; use the run's "
                f"{run.TOKENIZER}"
            )

    def _claim(self, ckpt_path: str | None) -> None:
        """Go on with the run in the folder, or set aside what an earlier run left there."""
        self._held.enter_context(run.lock(self.folder))
        if ckpt_path is not None and self.folder.resolve() in Path(ckpt_path).resolve().parents:
            print(f"going on from {ckpt_path}", flush=True)
            return
        step = run.last_step(self.folder)
        moved = run.set_aside(self.folder)
        if moved is not None:
            self._held.enter_context(run.lock(self.folder))
            print(
                f"the earlier run in {self.folder} (step {max(step, 0)}) is kept as {moved}; "
                f"to go on with it instead: --ckpt_path auto --name {moved.name}",
                flush=True,
            )

    def after_fit(self) -> None:
        if "val/loss" not in self.trainer.callback_metrics and self.datamodule is not None:
            self.trainer.validate(self.model, self.datamodule, verbose=False)  # a run too short for a validation
        if not self.trainer.is_global_zero:
            return
        scores = self.trainer.callback_metrics
        print("scores:   " + ", ".join(f"{k} {float(v):.4f}" for k, v in scores.items() if k.startswith("val/")))
        print(f"run:      {self.folder}")
        print(f"curves:   {self.folder / 'metrics.csv'}, or tensorboard --logdir {self.folder}")
        averaged = self.config_init[self.subcommand].averaging.path
        if averaged is not None:
            print(f"averaged: {averaged}")
        if (self.folder / "samples.txt").is_file():
            print(f"samples:  {self.folder / 'samples.txt'}")
        print(f"results:  {self.folder / 'results.json'}")

    def after_predict(self) -> None:
        if self.trainer.is_global_zero:
            print(f"predictions: {self.folder / PREDICTIONS}")
            for path in sorted((self.folder / SUBMISSION).glob("*")):
                print(f"submission:  {path}")


def _is_sharded(strategy: Any) -> bool:
    return isinstance(strategy, Namespace) and issubclass(class_of(strategy.class_path), Sharded)


def _without_memory(class_type: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return class_type(*args, **kwargs)


def _check_trainer(options: Namespace) -> None:
    """Refuse what would cut the endless stream of training rows into epochs, whose rows would repeat."""
    wrong = {
        "limit_train_batches": options.limit_train_batches not in (None, 1.0),
        "overfit_batches": bool(options.overfit_batches),
        "max_epochs": options.max_epochs not in (None, -1),
        "reload_dataloaders_every_n_epochs": bool(options.reload_dataloaders_every_n_epochs),
    }
    if any(wrong.values()):
        names = ", ".join(f"trainer.{name}" for name, is_wrong in wrong.items() if is_wrong)
        raise UserError(f"{names}: training rows are one endless stream; end it with --trainer.max_steps instead")


def _tokenizer_sha256(data: LightningDataModule | None) -> str | None:
    tokenizer = getattr(data, "tokenizer", None)
    return None if tokenizer is None else tokenizer_hash(tokenizer)


def _launched_processes() -> int:
    """How many processes a launcher (torchrun, srun) has started for this job; 1 without one."""
    return max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "SLURM_NTASKS"))


def _rank() -> int:
    """This process's rank by its launcher, known before there is a trainer; 0 for the first process alone."""
    launcher = next((name for name in ("RANK", "SLURM_PROCID") if name in os.environ), None)
    # without a launcher Lightning starts the processes of a node, and NODE_RANK is what tells the nodes apart
    names = ("LOCAL_RANK", "NODE_RANK") if launcher is None else (launcher,)
    return max(int(os.environ.get(name) or 0) for name in names)


def _quieten() -> None:
    """Leave out what Lightning says to everyone and what does not apply here."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    if "SLURM_JOB_ID" not in os.environ:
        warnings.filterwarnings("ignore", message=".*srun.* is available on your system but is not used.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*custom batch sampler.*for prediction.*")  # ours gives every row
    warnings.filterwarnings("ignore", message=".*recommended to use .*sync_dist=True.*")  # our metrics are reduced


def _no_advertisement(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(phrase in text for phrase in ("litlogger", "litmodels", "TPU available"))
