"""Verbs that take an experiment as `fit` does, and options of their own beside it."""

from __future__ import annotations

import argparse
import re
from difflib import get_close_matches
from typing import Any, NoReturn, get_args

from mhe_lightning.errors import UserError
from mhe_lightning.sizing import Mode, Spend


class PassingParser(argparse.ArgumentParser):
    """A parser of a verb's own options, which leaves those of `fit` to be passed on; errors are `UserError`.

    Args:
        verb: its name.
        options: as of `argparse.ArgumentParser`.
    """

    def __init__(self, verb: str, **options: Any) -> None:
        super().__init__(
            prog=f"train.py {verb}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def hint(self, message: str) -> str:
        """What may have been meant by an option that `fit` does not know; empty if nothing is near."""
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)(?=$|[\s=;])", message)
        own = [option for action in self._actions for option in action.option_strings]
        near = get_close_matches(unknown[1], own, n=1, cutoff=0.8) if unknown else []
        return f"; did you mean {near[0]}?" if near and "did you mean" not in message else ""


def add_variant_arguments(parser: PassingParser) -> None:
    """Options that say which attentions are compared, and what is equal among them."""
    parser.add_argument(
        "--attentions",
        nargs="+",
        metavar="NAME",
        help="Overlays in configs/attention by their names, or paths of YAML files (default: all in the folder).",
    )
    parser.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="equal_architecture",
        help="What is equal: the net but for its attention (the default); its parameters, to within 0.5 %%; or the "
        "FLOPs of training.",
    )
    parser.add_argument(
        "--spend",
        choices=get_args(Spend),
        default="feed_forward",
        help="Where the parameters or FLOPs go that a variant saves (default: feed_forward).",
    )
    parser.add_argument(
        "--reference",
        default="mha",
        metavar="NAME",
        help="The attention that the others are measured against, and equal to where that is asked for (default: mha).",
    )
