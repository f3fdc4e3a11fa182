"""Which tokens are chosen for prediction and what is seen in their place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mhe_lightning.data.masking import Masking
from mhe_lightning.data.tokenizer import BERT_SPECIAL_TOKENS, train_tokenizer

quick = settings(deadline=None, max_examples=150)
PAD, UNKNOWN, CLS, SEP, MASK = range(5)
WORDS = [*"abcdefgh", "##i", "##j", "##k", "##l", "##m", "##n", "##o", "##p"]


def wordpiece(ids: dict[str, int] | None = None) -> Tokenizer:
    """The special tokens 0 to 4, words 5 to 12 and pieces that continue them 13 to 20."""
    vocabulary = ids or {token: i for i, token in enumerate([*BERT_SPECIAL_TOKENS, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens([token for token in BERT_SPECIAL_TOKENS if token in vocabulary])
    return tokenizer


def bpe() -> Tokenizer:
    """A byte-level BPE with [MASK], and with the token ## as GPT-2's has it."""
    tokenizer = train_tokenizer(["## the cat sings\n## the dog sings\n"] * 4, "bpe", 300)
    tokenizer.add_special_tokens(["[MASK]"])
    return tokenizer


TOKENIZER = wordpiece()
SIZE = 5 + len(WORDS)
ROWS = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=60).map(lambda ids: np.array(ids, dtype=np.int64))
SHARES = st.floats(0.01, 0.99)
KEYS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4)


def words_of(tokens: np.ndarray) -> list[list[int]]:
    """The positions of each word, with specials between words left out."""
    words: list[list[int]] = []
    for i, token in enumerate(tokens.tolist()):
        if token < 5:
            continue
        if token >= 13 and i > 0 and tokens[i - 1] >= 5:
            words[-1].append(i)
        else:
            words.append([i])
    return words


@given(tokens=ROWS, share=SHARES, key=KEYS, whole_words=st.booleans())
@quick
def test_special_tokens_are_neither_chosen_nor_drawn(tokens, share, key, whole_words):
    seen, chosen = Masking(TOKENIZER, share=share, whole_words=whole_words)(tokens, key)
    assert seen.dtype == np.int64
    assert not chosen[tokens < 5].any()
    assert (seen[~chosen] == tokens[~chosen]).all()
    assert ((seen[chosen] == MASK) | (seen[chosen] >= 5)).all()


@given(tokens=ROWS, share=SHARES, key=KEYS)
@quick
def test_the_share_of_the_ordinary_tokens_is_chosen_and_at_least_one(tokens, share, key):
    _, chosen = Masking(TOKENIZER, share=share)(tokens, key)
    candidates = int((tokens >= 5).sum())
    assert chosen.sum() == (max(1, round(share * candidates)) if candidates else 0)


@given(tokens=ROWS, share=SHARES, key=KEYS)
@quick
def test_whole_words_are_chosen_whole_until_no_other_fits(tokens, share, key):
    _, chosen = Masking(TOKENIZER, share=share, whole_words=True)(tokens, key)
    words = words_of(tokens)
    taken = [word for word in words if chosen[word].any()]
    assert all(chosen[word].all() for word in taken)
    wanted = max(1, round(share * sum(map(len, words))))
    left = wanted - int(chosen.sum())
    assert bool(taken) == bool(words)
    assert left >= 0 or len(taken) == 1  # a word that is too long alone is taken if it comes first
    assert all(len(word) > left for word in words if word not in taken)


@given(tokens=ROWS, share=SHARES, key=KEYS, whole_words=st.booleans())
@quick
def test_masks_are_a_function_of_the_tokens_and_the_key(tokens, share, key, whole_words):
    masking = Masking(TOKENIZER, share=share, whole_words=whole_words)
    before = tokens.copy()
    seen, chosen = masking(tokens, key)
    masking(np.arange(5, 15), [1, 2, 3])  # a call between them, and the global generator, play no part
    np.random.seed(0)
    again_seen, again_chosen = Masking(TOKENIZER, share=share, whole_words=whole_words)(tokens, list(key))
    assert (tokens == before).all()
    assert (seen == again_seen).all()
    assert (chosen == again_chosen).all()


def test_each_number_of_the_key_matters():
    masking, tokens = Masking(TOKENIZER, share=0.5), np.full(60, 5)
    keys = ([1, 2, 3], [1, 2, 4], [1, 3, 3], [2, 2, 3], [1, 2])
    assert len({tuple(masking(tokens, key)[1]) for key in keys}) == len(keys)


def test_the_masks_of_a_key_stay_what_they_were():
    seen, chosen = Masking(TOKENIZER, share=0.4)(np.arange(5, 21), [42, 1, 7])
    assert np.flatnonzero(chosen).tolist() == [0, 2, 3, 6, 10, 12]
    assert seen[chosen].tolist() == [4, 4, 5, 11, 12, 4]


# --- frequencies; the keys are fixed, so that nothing here can fail by chance


def counts(whole_words: bool, tokens: np.ndarray, share: float, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each position is chosen, and what is seen at all that are, over ``draws`` keys."""
    masking = Masking(TOKENIZER, share=share, whole_words=whole_words)
    found = [masking(tokens, [0, 0, key]) for key in range(draws)]
    return sum(chosen.astype(int) for _, chosen in found), np.concatenate([seen[chosen] for seen, chosen in found])


def assert_frequency(count: int, probability: float, n: int) -> None:
    """Within six standard deviations of a binomial distribution."""
    assert abs(count - probability * n) < 6 * (n * probability * (1 - probability)) ** 0.5


@pytest.mark.parametrize("whole_words", [False, True])
def test_80_percent_are_seen_as_mask_10_as_any_ordinary_token_and_10_as_they_are(whole_words):
    original = 7  # a word of its own, so that whole words are single tokens
    _, seen = counts(whole_words, np.full(100, original), 0.2, draws=1500)
    n, ordinary = len(seen), len(WORDS)
    assert n == 1500 * 20
    assert_frequency((seen == MASK).sum(), 0.8, n)
    assert_frequency((seen == original).sum(), 0.1 + 0.1 / ordinary, n)
    for token in set(range(5, SIZE)) - {original}:
        assert_frequency((seen == token).sum(), 0.1 / ordinary, n)


@pytest.mark.parametrize("whole_words", [False, True])
def test_every_ordinary_position_is_equally_likely(whole_words):
    tokens = np.full(42, 7)
    tokens[[0, -1]] = CLS, SEP
    times, _ = counts(whole_words, tokens, 0.2, draws=2000)
    assert times[0] == times[-1] == 0
    for count in times[1:-1]:
        assert_frequency(count, 0.2, 2000)


def test_random_tokens_are_drawn_from_ids_that_there_are():
    tokenizer = wordpiece({"[UNK]": 0, "[MASK]": 1, "a": 5, "b": 900})
    seen = np.concatenate([Masking(tokenizer)(np.full(40, 5), [key])[0] for key in range(300)])
    assert set(seen.tolist()) == {1, 5, 900}


# --- words


def chosen_together(tokenizer: Tokenizer, text: str) -> list[list[str]]:
    """The texts' tokens, those of a word together, found by masking one token's worth under many keys."""
    encoding = tokenizer.encode(text)
    masking = Masking(tokenizer, share=0.001, whole_words=True)
    groups = {tuple(np.flatnonzero(masking(np.array(encoding.ids), [key])[1])) for key in range(200)}
    assert sorted(i for group in groups for i in group) == list(range(len(encoding.ids)))  # each in one word
    return [[encoding.tokens[i] for i in group] for group in sorted(groups)]


def test_wordpiece_words_are_their_first_piece_and_those_with_the_prefix():
    tokenizer = train_tokenizer(["the cats sing, the dogs sing"] * 4, "wordpiece", 128)
    words = chosen_together(tokenizer, "the sings, tes")
    assert ["".join(word).replace("##", "") for word in words] == ["the", "sings", ",", "tes"]
    assert any(len(word) > 1 for word in words)


def test_byte_level_words_begin_with_a_space():
    words = chosen_together(bpe(), "the dogs see## the\nnight")
    assert ["".join(word) for word in words] == ["the", "Ġdogs", "Ġsee##", "Ġthe", "Ċnight"]


def test_a_token_of_signs_in_a_byte_level_vocabulary_is_no_wordpiece_prefix():
    assert bpe().token_to_id("##") is not None
    assert ["".join(word) for word in chosen_together(bpe(), "## night")] == ["##", "Ġnight"]


def test_a_special_token_ends_a_word():
    tokens = np.array([CLS, 5, 13, SEP, 14, 15, SEP])
    masking = Masking(TOKENIZER, share=0.01, whole_words=True)
    groups = {tuple(np.flatnonzero(masking(tokens, [key])[1])) for key in range(40)}
    assert groups == {(1, 2), (4, 5)}


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_row_of_special_tokens_has_nothing_to_predict(whole_words):
    tokens = np.array([CLS, SEP, SEP, PAD, MASK, UNKNOWN])
    seen, chosen = Masking(TOKENIZER, whole_words=whole_words)(tokens, [0])
    assert not chosen.any()
    assert (seen == tokens).all()


# --- what is refused


def test_a_tokenizer_without_a_mask_token_is_refused_with_the_remedy():
    tokenizer = train_tokenizer(["the cat sings"] * 4, "bpe", 257)
    with pytest.raises(ValueError, match=r"no mask token; use a wordpiece one, or add \[MASK\]"):
        Masking(tokenizer)
    tokenizer.add_special_tokens(["<mask>"])
    assert Masking(tokenizer).mask == tokenizer.token_to_id("<mask>")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=rf"mask_share \({share}\) must be between 0 and 1"):
        Masking(TOKENIZER, share=share)
