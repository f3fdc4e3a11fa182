"""Tokens to text while they come, without a character that would change later."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder gives for bytes that are no character, or not yet."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Decodes the tokens of one text as they come: what it gave is always how the whole text begins, and in the end it.

    What may change with the tokens to come is held back: an incomplete UTF-8 character of a byte-level BPE; a run of
    byte tokens (``<0xE2>``), which is one text or, with one wrong byte, none; and what may be the beginning of a
    ``stop``. The decoder has to read from left to right, as those of byte-level BPE, WordPiece and SentencePiece do.
    Only the tokens since the last that was complete are decoded again, with that one before them, so a step's time does
    not grow with the text.

    Args:
        tokenizer: of the tokens.
        after: tokens of the text before, whole characters, which are not given again. Where there is something before
            it, a first word has its space.
        stop: the text ends before the first of these in it.

    Raises:
        ValueError: a ``stop`` is empty.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise ValueError("a stop text is empty; leave it out to stop at none")
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._stop = tuple(stop)
        # one token before is enough, but of bytes: these would be a part of a run that comes
        self._ids = [i for i in after if self._is_text(i) and not self._is_byte(i)][-1:]
        self._before = self._decode(self._ids)  # of the text of `_ids`, what was taken
        self._held = ""  # taken, but perhaps the beginning of a stop
        self.stopped = False

    def push(self, token: int) -> str:
        """What is certain of the text with the next ``token`` and was not given yet; nothing after a stop."""
        if self.stopped or not self._is_text(token):
            return ""
        self._ids.append(token)
        if self._is_byte(token):
            return ""
        text = self._decode(self._ids)
        taken = text.removesuffix(REPLACEMENT)  # an incomplete character is one of these
        new = taken[len(self._before) :]
        if taken == text:
            self._ids = self._ids[-1:]
            self._before = self._decode(self._ids)
        else:
            self._before = max(self._before, taken, key=len)
        return self._release(new)

    def end(self) -> str:
        """The rest of the text, when there is no further token."""
        if self.stopped:
            return ""
        rest = self._release(self._decode(self._ids)[len(self._before) :])
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, new: str) -> str:
        """``new`` behind what was held, up to a stop or what may become one."""
        text = self._held + new
        ends = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        given, self._held = text[: len(text) - held], text[len(text) - held :]
        return given

    def _is_text(self, token: int) -> bool:
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def _is_byte(self, token: int) -> bool:
        return _BYTE.fullmatch(self._tokenizer.id_to_token(token) or "") is not None

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` begins with, the most there are but not all of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
