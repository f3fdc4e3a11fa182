"""Texts and pairs of texts as the token sequences that a finetuned net reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

from mhe_lightning.data.tokenizer import end_of_text_id, start_of_sequence_id

TextPair = tuple[str, str | None]


class TokenSequence(NamedTuple):
    """One or two texts as tokens: ``[CLS] first [SEP] second [SEP]``.

    `boundary` is the index of the second text's first token (the length, where there is none), `offsets` the
    characters [start, end) of each token in its text ((0, 0) for special tokens), `truncated` whether a text was cut.
    """

    tokens: list[int]
    boundary: int
    offsets: list[tuple[int, int]]
    truncated: bool

    def token_span(self, text: int, start: int, end: int) -> tuple[int, int] | None:
        """The tokens [first, last + 1) that hold characters [start, end) of the first (0) or second (1) text.

        None if no token holds any of them, or one that does was cut off.
        """
        tokens = range(self.boundary) if text == 0 else range(self.boundary, len(self.tokens))
        inside = [i for i in tokens if self.offsets[i][0] < end and self.offsets[i][1] > start]
        # in an uncut text, the last characters may be in no token, such as a combining accent
        if not inside or (self.truncated and self.offsets[inside[-1]][1] < end):
            return None
        return inside[0], inside[-1] + 1


class SequenceFormat:
    """Makes sequences of at most ``max_length`` tokens; the longer text of a pair is cut first, at its end.

    A tokenizer without ``[CLS]`` (one trained for a decoder) begins with the text; each text ends with the tokenizer's
    ``[SEP]`` or end-of-text token. Text that spells out a special token gets its characters, not the token.

    Args:
        tokenizer: the tokenizer.
        max_length: most tokens of a sequence, special ones included.

    Raises:
        ValueError: ``max_length`` leaves no room for text.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        if max_length < 5:
            raise ValueError(f"max_length ({max_length}) must be at least 5: [CLS], two texts and two [SEP]")
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.encode_special_tokens = True
        self.max_length = max_length
        start = start_of_sequence_id(tokenizer)
        self.start = [] if start is None else [start]
        self.end = end_of_text_id(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """The tokens of each text, without special ones, uncut."""
        return self.tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def pairs(self, pairs: Sequence[TextPair]) -> list[TokenSequence]:
        """Each text, or pair of texts, as one sequence."""
        seconds = [second for _, second in pairs if second is not None]
        encoded_second = iter(self.encode(seconds))
        return [
            self._join(first, None if second is None else next(encoded_second))
            for first, (_, second) in zip(self.encode([first for first, _ in pairs]), pairs, strict=True)
        ]

    def _join(self, first: Encoding, second: Encoding | None) -> TokenSequence:
        kept_first, kept_second = len(first.ids), 0 if second is None else len(second.ids)
        room = self.max_length - len(self.start) - (1 if second is None else 2)
        excess = max(0, kept_first + kept_second - room)
        if excess:
            kept_first, kept_second = _cut(kept_first, kept_second, room)
        tokens = [*self.start, *first.ids[:kept_first], self.end]
        none = (0, 0)
        offsets = [*[none] * len(self.start), *first.offsets[:kept_first], none]
        boundary = len(tokens)
        if second is not None:
            tokens += [*second.ids[:kept_second], self.end]
            offsets += [*second.offsets[:kept_second], none]
        return TokenSequence(tokens, boundary, offsets, excess > 0)


def _cut(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts that fit into ``room``, the longer one cut first."""
    shorter = min(first, second, room // 2)
    if first <= second:
        return shorter, min(second, room - shorter)
    return min(first, room - shorter), shorter
