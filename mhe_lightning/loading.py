"""What the verbs that use a trained model share: its net, its tokenizer, and lines of text to work on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from tokenizers import Tokenizer
from torch import nn

from mhe_lightning import run
from mhe_lightning.checkpoint import config_of, read_checkpoint, run_of
from mhe_lightning.data.tokenizer import load_tokenizer, vocabulary_size
from mhe_lightning.errors import UserError
from mhe_lightning.nets import load_net
from mhe_lightning.parsing import Parser


class Trained(NamedTuple):
    """A model to use: its net in eval mode, its tokenizer, and the settings of the task that it was trained for."""

    net: Any
    tokenizer: Tokenizer
    settings: dict[str, Any]


def load_trained(options: Namespace, kind: type[nn.Module] | tuple[type[nn.Module], ...], does: str) -> Trained:
    """What the options of `add_model_arguments` name.

    Args:
        options: the parsed options.
        kind: the class of nets that the verb can use, or several.
        does: what these do, for the message about another, such as "decoders generate text".

    Raises:
        UserError: an option is out of range, the net is of another class, or the tokenizer is not the net's.
    """
    if options.batch_size < 1:
        raise UserError(f"batch_size ({options.batch_size}) must be at least 1")
    folder, path = find_checkpoint(options.run_or_ckpt, options.ckpt_path)
    checkpoint = read_checkpoint(path)
    net = load_net(checkpoint)
    if not isinstance(net, kind):
        raise UserError(f"{path} holds a {type(net).__name__}; only {does}")
    tokenizer = load_tokenizer_of(net, options.tokenizer or folder / run.TOKENIZER)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        net.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's, for a device that is unknown or not there
        raise UserError(f"device ({device}) cannot be used: {str(error).splitlines()[0]}") from error
    return Trained(net, tokenizer, config_of(checkpoint)["model"]["init_args"])


def load_tokenizer_of(net: nn.Module, path: str | Path) -> Tokenizer:
    """The tokenizer in a file, for a net.

    Raises:
        ValueError: it is none, or has more tokens than the net.
    """
    tokenizer = load_tokenizer(path)
    if vocabulary_size(tokenizer) > net.vocab_size:  # type: ignore[operator]
        raise ValueError(
            f"the tokenizer has {vocabulary_size(tokenizer)} tokens but the model {net.vocab_size}; "
            "use the one that it was trained with"
        )
    return tokenizer


def find_checkpoint(run_or_ckpt: str, ckpt_path: str) -> tuple[Path, Path]:
    """The run directory and the checkpoint that a verb's arguments mean.

    Args:
        run_or_ckpt: a run directory or a checkpoint file.
        ckpt_path: of a run directory "auto", "best" or "averaged".

    Raises:
        UserError: the run has no such checkpoint.
    """
    given = Path(run_or_ckpt)
    folder, path = run_of(given)
    if given.resolve() == folder.resolve() and ckpt_path != "auto":
        found = run.resolve_checkpoint(ckpt_path, folder)
        if found is None:
            raise UserError(f"{folder} holds no {ckpt_path} checkpoint; leave out --ckpt_path for its newest")
        path = Path(found)
    return folder, path


def add_model_arguments(parser: Parser) -> None:
    """Options that say which model is used, where, and with how many texts at a time."""
    parser.add_argument("run_or_ckpt", type=str, help="A run directory or a checkpoint file.")
    add_use_arguments(parser)


def add_use_arguments(parser: Parser) -> None:
    """The same without the model's path: those of `load_trained` that several models can share."""
    add_checkpoint_argument(parser)
    parser.add_argument("--batch_size", type=int, default=16, help="Texts that go through the model together.")
    parser.add_argument("--tokenizer", type=str, help="A tokenizer.json (default: the run's).")
    parser.add_argument("--device", type=str, help="Such as cpu or cuda:1 (default: a GPU if there is one).")


def add_checkpoint_argument(parser: Parser) -> None:
    """The option that says which checkpoint of a run is used."""
    parser.add_argument(
        "--ckpt_path",
        type=str,
        choices=["auto", "best", "averaged"],
        default="auto",
        help="Of a run directory: its newest checkpoint ('auto'), the best or the averaged one.",
    )


def lines_of_file(path: str) -> list[str]:
    """The lines of a text file without their ends.

    Raises:
        UserError: it is not UTF-8 text.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; convert it with iconv") from error


def lines_of_stdin(prompt: str) -> Iterator[str]:
    """The lines of standard input without their ends; someone at a terminal is told ``prompt``."""
    if sys.stdin.isatty():
        print(prompt, file=sys.stderr)
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text; convert it with iconv") from error
