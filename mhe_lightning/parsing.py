"""Parsers whose errors are one short message."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import lightning
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import mhe_lightning
from mhe_lightning.errors import UserError


class Parser(LightningArgumentParser):
    """LightningCLI's parser, without abbreviations and with short errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        if not self.exit_on_error:
            super().error(message, ex)  # a parser within the parser: the outer one reports
        raise UserError(condense(message, known)) from ex


def data_module(spec: Namespace) -> LightningDataModule:
    """The data module of a parsed config's ``data``, and nothing else of the config."""
    parser = Parser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    data: LightningDataModule = parser.instantiate(Namespace(data=spec)).data
    return data


def condense(message: str, known: Sequence[str] = ()) -> str:
    """jsonargparse's nested explanation as ``key: what is wrong``, with the nearest known option where one is near."""
    path: list[str] = []
    leaves: list[str] = []
    for line in message.splitlines():
        text = _FACTORY.sub("", line.strip().removeprefix("- ")).strip()
        if match := _KEY.match(text):
            path.append(match.group(1))
            text = text[match.end() :].strip()
        if text and not text.startswith(_NOISE) and text != "Expected a <class 'NoneType'>":
            leaves.append(text)
    what = "; ".join(dict.fromkeys(leaves)) or message.strip()
    if what.startswith("the following arguments are required") and "data" in what:
        what += " (they come with --config, such as --config configs/quickstart.yaml)"
    for word in re.findall(r"--[\w.]+", what):
        near = get_close_matches(word, known, n=1, cutoff=0.8)
        if near and near[0] != word:
            what += f"; did you mean {near[0]}?"
    return f"{'.'.join(path)}: {what}" if path else what


_KEY = re.compile(r'Parser key "([\w.]+)":')
_FACTORY = re.compile(r"Type <class '[\w.]+'> expects a function or a callable class: |\. Got value: Namespace\(.*\)$")
_STATE_MISMATCH = ("loading state_dict", "loaded state dict")
_NOISE = (
    "Does not validate against",
    "Not a valid subclass of",
    "Subtypes:",
    "Errors:",
    "Problem with given class_path",
    "Given value",
)


def as_user_error(error: BaseException) -> UserError | None:
    """The error as one for the user, if it is: raised by this package as `ValueError`, or a setting that Lightning
    or jsonargparse refuses. Any other error deserves its traceback."""
    if isinstance(error, MisconfigurationException) or str(error).startswith(_NOISE):
        return UserError(condense(str(error)))
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(mhe_lightning.__file__).parent
    if isinstance(error, ValueError) and frames and ours in Path(frames[-1].filename).parents:
        return UserError(str(error))
    # torch's words for weights (RuntimeError) and an optimizer's state (ValueError) that do not fit
    if isinstance(error, (ValueError, RuntimeError)) and any(w in str(error) for w in _STATE_MISMATCH):
        found = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = found[1] if len(found) > 1 else found[0]
        more = f" (and {len(found) - 2} more)" if len(found) > 2 else ""
        return UserError(f"the checkpoint does not fit the model of this config: {what}{more}")
    theirs = Path(lightning.__file__).parent
    if isinstance(error, (ValueError, ModuleNotFoundError)) and frames and theirs in Path(frames[-1].filename).parents:
        return UserError(str(error))
    return None
