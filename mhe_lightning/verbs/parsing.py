"""Parsers whose errors are one short message."""

from __future__ import annotations

import traceback
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

import mhe_lightning
from mhe_lightning.verbs import UserError


class Parser(LightningArgumentParser):
    """LightningCLI's parser, without abbreviations and with short errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        raise UserError(condense(message, known)) from ex


def condense(message: str, known: list[str]) -> str:
    """jsonargparse's nested explanation as ``key: what is wrong``, with the nearest known option where one is near."""
    path: list[str] = []
    leaves: list[str] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ").strip()
        if text.startswith('Parser key "'):
            key, _, rest = text.removeprefix('Parser key "').partition('":')
            path.append(key)
            text = rest.strip()
        if text and not text.startswith(_NOISE) and text != "Expected a <class 'NoneType'>":
            leaves.append(text)
    what = "; ".join(dict.fromkeys(leaves)) or message.strip().splitlines()[-1]
    words = what.replace("=", " ").replace("'", " ").split()
    for word in words:
        option = word if word.startswith("--") else f"--{word}"
        near = get_close_matches(option, known, n=1, cutoff=0.8)
        if "." in option or word.startswith("--"):
            if near and near[0] != option:
                what += f"; did you mean {near[0]}?"
            break
    return f"{'.'.join(path)}: {what}" if path else what


_NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Problem with given class_path", "Given value")


def as_user_error(error: BaseException) -> UserError | None:
    """A `ValueError` that this package raised is one for the user; any other error deserves its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(mhe_lightning.__file__).parent
    if isinstance(error, ValueError) and frames and ours in Path(frames[-1].filename).parents:
        return UserError(str(error))
    return None
