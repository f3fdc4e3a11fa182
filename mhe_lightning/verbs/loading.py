"""What the verbs that use a trained model share: its net, its tokenizer, and lines of text to work on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from mhe_lightning import run
from mhe_lightning.checkpoint import config_of, read_checkpoint, run_of
from mhe_lightning.data.tokenizer import load_tokenizer, vocabulary_size
from mhe_lightning.verbs import UserError
from mhe_lightning.verbs.parsing import Parser


def load_trained(run_or_ckpt: str, kind: type[nn.Module], does: str, tokenizer: str | None) -> tuple[Any, Tokenizer]:
    """The net of a run (its newest checkpoint) or of a checkpoint, in eval mode, and its tokenizer.

    Args:
        run_or_ckpt: a run directory or a checkpoint file.
        kind: the class of nets that the verb can use.
        does: what these do, for the message about another, such as "decoders generate text".
        tokenizer: path of a tokenizer.json; the run's if not given.

    Raises:
        UserError: the net is of another class, or the tokenizer is not the net's.
    """
    folder, path = run_of(Path(run_or_ckpt))
    net = load_net(read_checkpoint(path))
    if not isinstance(net, kind):
        raise UserError(f"{path} holds a {type(net).__name__}; only {does}")
    loaded = load_tokenizer(tokenizer or folder / run.TOKENIZER)
    if vocabulary_size(loaded) > net.vocab_size:  # type: ignore[operator]
        raise UserError(
            f"the tokenizer has {vocabulary_size(loaded)} tokens but the model {net.vocab_size}; "
            "use the one that it was trained with"
        )
    return net, loaded


def load_net(checkpoint: dict[str, Any]) -> nn.Module:
    """The net of a checkpoint, built from its config, with its weights, in eval mode."""
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    spec = config_of(checkpoint)["model"]["init_args"]["net"]
    spec.setdefault("init_args", {})["vocab_size"] = weights["token_embedding.weight"].shape[0]
    parser = Parser()
    parser.add_subclass_arguments(nn.Module, "net")
    net: nn.Module = parser.instantiate(parser.parse_object({"net": spec})).net
    net.load_state_dict(weights)
    return net.eval()


def add_model_arguments(parser: Parser) -> None:
    """Options that say which model is used, and with how many texts at a time."""
    parser.add_argument("run_or_ckpt", type=str, help="A run directory (its newest checkpoint) or a checkpoint file.")
    parser.add_argument("--batch_size", type=int, default=16, help="Texts that go through the model together.")
    parser.add_argument("--tokenizer", type=str, help="A tokenizer.json (default: the run's).")


def lines_of_stdin(prompt: str) -> Iterator[str]:
    """The lines of standard input without their ends; someone at a terminal is told ``prompt``."""
    if sys.stdin.isatty():
        print(prompt, file=sys.stderr)
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text; convert it with iconv") from error
