"""Text that is given while its tokens come is, in the end, the decoded tokens, whatever they are."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mhe_lightning.data.tokenizer import train_tokenizer
from mhe_lightning.models.text_stream import TextStream

SIZES = {"bpe": 330, "wordpiece": 200, "unigram": 330}
every_kind = pytest.mark.parametrize("kind", SIZES)
TEXTS = [
    "the cat sat on the mat, didn't it? naïve café 日本 \ufffd",
    "it's a cat. well! (what) is it, then? we're off",
] * 20


@cache
def tokenizer(kind: str) -> Tokenizer:
    return train_tokenizer(TEXTS, kind, SIZES[kind])


def streamed(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.end()]


texts = st.text(max_size=12) | st.sampled_from(["日本語 😀", "it's done. don't", "é\ufffdé", "\ufffd\ufffd", "a  b "])
tokens = st.lists(st.integers(0, max(SIZES.values()) + 3), max_size=12)  # also such as no vocabulary has


@every_kind
@settings(max_examples=150, deadline=None)
@given(text=texts, ids=tokens, cut=st.integers(0, 20), more=texts)
@example(text="日本語 😀", ids=[], cut=2, more="")
def test_what_was_streamed_is_the_decoded_text(kind, text, ids, cut, more):
    t = tokenizer(kind)
    ids = [*t.encode(text).ids[cut:], *ids, *t.encode(more).ids]
    assert "".join(streamed(TextStream(t), ids)) == t.decode(ids)


@every_kind
@settings(max_examples=100, deadline=None)
@given(before=st.sampled_from(["the cat", "café", "日本", "it", "a."]), text=texts)
def test_after_a_text_it_is_what_the_whole_text_goes_on_with(kind, before, text):
    t = tokenizer(kind)
    first, ids = t.encode(before).ids, t.encode("cat sat").ids + t.encode(text).ids
    assert t.decode(first) + "".join(streamed(TextStream(t, after=first), ids)) == t.decode(first + ids)


@every_kind
@settings(max_examples=150, deadline=None)
@given(ids=tokens, text=texts, stop=st.lists(st.text("aet h.", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_text_ends_before_the_first_stop_in_it(kind, ids, text, stop):
    t = tokenizer(kind)
    ids = t.encode("the cat sat on the mat " + text).ids + ids
    stream, whole, given_ = TextStream(t, stop=stop), t.decode(ids), ""
    for token in ids:
        given_ += stream.push(token)
        if stream.stopped:
            break
    given_ += stream.end()
    assert whole.startswith(given_)
    assert not any(s in given_ for s in stop)
    assert stream.stopped == any(s in whole for s in stop)
    assert given_ == whole if not stream.stopped else any(whole.startswith(s, len(given_)) for s in stop)


def test_a_character_of_several_tokens_is_given_when_it_is_whole():
    t = tokenizer("bpe")
    ids = t.encode("a😀b").ids
    assert len(ids) == 6
    assert streamed(TextStream(t), ids) == ["a", "", "", "", "😀", "b", ""]


def test_an_incomplete_character_at_the_end_is_given_as_it_is_decoded():
    t = tokenizer("bpe")
    ids = t.encode("a😀").ids[:-1]
    assert "".join(streamed(TextStream(t), ids)) == t.decode(ids) == "a\ufffd"


def test_bytes_are_given_when_their_run_has_ended():
    t = tokenizer("unigram")
    ids = t.encode("é😀 cat").ids  # é is in the vocabulary
    pieces = streamed(TextStream(t), ids)
    assert "".join(pieces) == t.decode(ids) == "é😀 cat"
    assert not any("\ufffd" in piece for piece in pieces)
    byte = next(i for i, token in enumerate(ids) if t.id_to_token(token).startswith("<0x"))
    assert pieces[byte : byte + 4] == [""] * 4
    assert pieces[byte + 4].startswith("😀")


def test_most_pieces_come_with_their_token():
    for kind in SIZES:
        t = tokenizer(kind)
        assert all(streamed(TextStream(t), t.encode("the cat sat on the mat").ids)[1:-1])


def test_a_beginning_of_a_stop_is_held_back_and_given_if_it_was_none():
    t = tokenizer("bpe")
    ids = [t.token_to_id(c) for c in "abcabd"]
    assert streamed(TextStream(t, stop=["abd"]), ids[:3]) == ["", "", "abc", ""]
    stream = TextStream(t, stop=["abd"])
    assert streamed(stream, ids) == ["", "", "abc", "", "", "", ""]
    assert stream.stopped
    assert streamed(TextStream(t, stop=["abd"]), ids[:5]) == ["", "", "abc", "", "", "ab"]


def test_nothing_comes_after_a_stop():
    t = tokenizer("bpe")
    stream = TextStream(t, stop=["b"])
    assert streamed(stream, [t.token_to_id(c) for c in "abcd"]) == ["a", "", "", "", ""]


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="a stop text is empty; leave it out"):
        TextStream(tokenizer("bpe"), stop=["a", ""])
