"""Texts and pairs of texts as token sequences."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhe_lightning.data.sequences import SequenceFormat, TokenSequence
from mhe_lightning.data.tokenizer import train_tokenizer

quick = settings(deadline=None, max_examples=80)
TEXTS = ["the quick brown fox jumps over the lazy dog", "Sphinx of black quartz judge my vow [SEP] [CLS] <|endoftext|>"]
KINDS = ("wordpiece", "bpe")
kinds = pytest.mark.parametrize("kind", KINDS)

words = st.text("abcdefghijklmnopqrstuvwxyzQ", min_size=1, max_size=8)
texts = st.lists(words, max_size=12).map(" ".join)


@cache
def form(kind: str, max_length: int = 10**6) -> SequenceFormat:
    return SequenceFormat(train_tokenizer(TEXTS * 3, kind, 300), max_length)


def lengths(kind: str, first: str, second: str) -> tuple[int, int]:
    """Tokens of two texts by themselves."""
    a, b = form(kind).encode([first, second])
    return len(a.ids), len(b.ids)


def kept(sequence: TokenSequence, kind: str) -> tuple[int, int]:
    """How many tokens of the first and the second text are in a sequence of a pair."""
    start = len(form(kind).start)
    return sequence.boundary - start - 1, len(sequence.tokens) - sequence.boundary - 1


@kinds
@given(first=texts, second=st.none() | texts, max_length=st.integers(5, 30))
@quick
def test_no_sequence_is_longer_than_max_length_and_one_that_fits_is_whole(kind, first, second, max_length):
    (whole,) = form(kind).pairs([(first, second)])
    (cut,) = form(kind, max_length).pairs([(first, second)])
    assert len(cut.tokens) == len(cut.offsets) == min(max_length, len(whole.tokens))
    assert not whole.truncated
    assert cut.truncated == (len(whole.tokens) > max_length)
    if not cut.truncated:
        assert cut == whole


@kinds
@given(first=texts, second=texts, max_length=st.integers(5, 30))
@quick
def test_the_longer_text_is_cut_first_and_at_its_end(kind, first, second, max_length):
    (whole,), (cut,) = form(kind).pairs([(first, second)]), form(kind, max_length).pairs([(first, second)])
    assume(cut.truncated)
    had, has = lengths(kind, first, second), kept(cut, kind)
    for own, other in ((0, 1), (1, 0)):
        if has[own] < had[own]:
            assert has[own] >= has[other] - 1
    start = len(form(kind).start)
    assert cut.tokens[start : start + has[0]] == whole.tokens[start : start + has[0]]
    assert cut.tokens[cut.boundary : -1] == whole.tokens[whole.boundary : whole.boundary + has[1]]


@pytest.mark.parametrize(
    ("n_first", "n_second", "room", "expected"),
    [(2, 9, 8, (2, 6)), (9, 2, 8, (6, 2)), (9, 9, 8, (4, 4)), (9, 9, 7, (3, 4)), (5, 4, 8, (4, 4)), (0, 9, 8, (0, 8))],
)
def test_cuts_by_hand(n_first, n_second, room, expected):
    short = form("wordpiece", room + 3)
    (cut,) = short.pairs([(" ".join("a" * n_first), " ".join("b" * n_second))])
    assert kept(cut, "wordpiece") == expected


@kinds
@given(first=texts, second=st.none() | texts)
@quick
def test_a_sequence_is_start_text_end_and_the_second_text_begins_at_the_boundary(kind, first, second):
    maker = form(kind)
    (sequence,) = maker.pairs([(first, second)])
    encoded = maker.encode([first, second or ""])
    expected = [*maker.start, *encoded[0].ids, maker.end]
    assert sequence.boundary == len(expected)
    if second is not None:
        expected += [*encoded[1].ids, maker.end]
    assert sequence.tokens == expected


def test_a_tokenizer_of_a_decoder_has_no_token_that_begins_a_sequence():
    wordpiece, bpe = form("wordpiece"), form("bpe")
    assert wordpiece.start == [wordpiece.tokenizer.token_to_id("[CLS]")]
    assert wordpiece.end == wordpiece.tokenizer.token_to_id("[SEP]")
    assert bpe.start == []
    assert bpe.end == bpe.tokenizer.token_to_id("<|endoftext|>")


@kinds
@given(first=texts, second=texts, max_length=st.integers(5, 40))
@quick
def test_offsets_are_the_tokens_places_in_their_text(kind, first, second, max_length):
    maker = form(kind, max_length)
    (sequence,) = maker.pairs([(first, second)])
    special = {*maker.start, maker.end}
    for i, (token, (start, end)) in enumerate(zip(sequence.tokens, sequence.offsets, strict=True)):
        text = first if i < sequence.boundary else second
        if token in special:
            assert (start, end) == (0, 0)
        else:
            spelled = maker.tokenizer.id_to_token(token).removeprefix("##").replace("Ġ", " ")
            expected = text[start:end]
            assert spelled in ("[UNK]", expected.lower() if kind == "wordpiece" else expected)


@kinds
@given(data=st.data(), first=texts, second=texts)
@quick
def test_the_tokens_of_characters_hold_them_all_and_no_token_beside_them_does(kind, data, first, second):
    (sequence,) = form(kind).pairs([(first, second)])
    which = data.draw(st.integers(0, 1))
    text = (first, second)[which]
    assume(text)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    assume(not text[start].isspace() and not text[end - 1].isspace())
    begin, stop = sequence.token_span(which, start, end)
    offsets = sequence.offsets
    assert offsets[begin][0] <= start < offsets[begin][1]
    assert offsets[stop - 1][0] < end <= offsets[stop - 1][1]
    assert (begin < sequence.boundary) == (stop <= sequence.boundary) == (which == 0)


def test_characters_that_were_cut_off_have_no_tokens():
    (sequence,) = form("wordpiece", 5).pairs([("a b c d e", None)])
    assert sequence.token_span(0, 4, 5) == (3, 4)
    assert sequence.token_span(0, 6, 7) is None
    assert sequence.token_span(0, 4, 7) is None


def test_characters_that_the_tokenizer_drops_do_not_count_as_cut_off():
    text = "the fox cafe\u0301 ran"  # the accent is a character of its own, which BERT's normalizer removes
    (sequence,) = form("wordpiece").pairs([(text, None)])
    begin, stop = sequence.token_span(0, 8, 13)
    assert (sequence.offsets[begin][0], sequence.offsets[stop - 1][1]) in ((8, 12), (8, 13))


@kinds
@pytest.mark.parametrize("literal", ["[SEP]", "[CLS]", "<|endoftext|>"])
def test_text_that_spells_out_a_special_token_is_text(kind, literal):
    maker = form(kind)
    (sequence,) = maker.pairs([(f"fox {literal} dog", None)])
    special = {*maker.start, maker.end}
    assert [i for i, token in enumerate(sequence.tokens) if token in special] == (
        [0, len(sequence.tokens) - 1] if maker.start else [len(sequence.tokens) - 1]
    )


def test_a_length_without_room_for_two_texts_is_refused():
    with pytest.raises(ValueError, match=r"max_length \(4\) must be at least 5: \[CLS\], two texts and two \[SEP\]"):
        SequenceFormat(form("wordpiece").tokenizer, 4)
