"""`prepare`: tokenise the data of an experiment config."""

from __future__ import annotations

from typing import Any, Optional

from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningDataModule

from mhe_lightning.data import ExactDataModule
from mhe_lightning.errors import UserError
from mhe_lightning.parsing import Parser, as_user_error, data_module
from mhe_lightning.pretrained import take_tokenizer
from mhe_lightning.run import OBSERVING


def main(verb: str, args: list[str]) -> None:
    parser = Parser(prog="train.py prepare", description="Tokenise the data of an experiment config.")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="An experiment's YAML; may be repeated.")
    parser.add_subclass_arguments(LightningDataModule, "data", required=True, help="The data module to prepare.")
    parser.add_argument("--seed_everything", type=int, default=1, help="The run's seed.")
    parser.link_arguments("seed_everything", "data.init_args.seed")
    parser.add_argument(
        "--init_from",
        type=Optional[str],  # noqa: UP045 - jsonargparse on Python 3.10
        help="A pretraining run or checkpoint, whose tokenizer is taken where data.tokenizer is not set.",
    )
    for key in ("model", "trainer", "checkpoints", "averaging", "samples", *OBSERVING):
        parser.add_argument(f"--{key}", type=Any, help="Accepted, so that a whole config fits; not used.")
    for key in ("name", "ckpt_path", "weights_only"):
        parser.add_argument(f"--{key}", help="Accepted, so that a whole config fits; not used.")
    try:
        options = parser.parse_args(args)
        take_tokenizer(options.data.init_args, options.init_from)
        data = data_module(options.data)
        if not isinstance(data, ExactDataModule):
            raise UserError(f"{type(data).__name__} has nothing to prepare")
        data.prepare()
        facts = data.describe()
    except ValueError as error:
        raise as_user_error(error) or error from error
    for name, value in facts.items():
        print(f"{name}: {value}")
