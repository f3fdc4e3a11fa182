"""Packed tokens as rows to train on and to evaluate."""

from __future__ import annotations

from itertools import islice, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhe_lightning.data import CorpusSpec, LanguageModelingData
from mhe_lightning.data.language_modeling import IGNORE, PackedBlocks
from mhe_lightning.data.sampler import PADDING_ROW

quick = settings(deadline=None, max_examples=150)
END = 0


class Split:
    """Tokens in memory that are read as a packed split is. By default token i is i + 1, so that it says where it is."""

    counts = SimpleNamespace(words=30, bytes=120)

    def __init__(self, tokens) -> None:
        self.tokens = np.asarray(tokens, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= len(self)
        return self.tokens[start:stop].copy()


def counted(n_tokens: int) -> Split:
    return Split(np.arange(1, n_tokens + 1))


@st.composite
def windows(draw: st.DrawFn) -> dict[str, int]:
    length = draw(st.integers(1, 12))
    return {"length": length, "stride": draw(st.integers(1, length))}


# --- training rows


@given(n_tokens=st.integers(2, 80), length=st.integers(1, 12))
@quick
def test_training_rows_follow_each_other_and_cover_the_stream_up_to_a_last_part(n_tokens, length):
    assume(n_tokens > length)
    blocks = PackedBlocks(counted(n_tokens), length=length)
    rows = [blocks[row] for row in range(len(blocks))]
    assert all(row["tokens"].shape == row["targets"].shape == (length,) for row in rows)
    assert torch.cat([row["tokens"] for row in rows]).tolist() == list(range(1, len(blocks) * length + 1))
    assert torch.cat([row["targets"] for row in rows]).tolist() == list(range(2, len(blocks) * length + 2))
    assert 0 <= n_tokens - 1 - len(blocks) * length < length
    assert [row["rows"] for row in rows] == list(range(len(blocks)))
    for row, following in pairwise(rows):
        assert row["targets"][-1] == following["tokens"][0]


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_less_than_one_training_row_is_refused_with_what_is_missing(n_tokens):
    with pytest.raises(ValueError, match=rf"{n_tokens} tokens, less than one row of block_length \+ 1 = 9; lower"):
        PackedBlocks(counted(n_tokens), length=8)
    assert len(PackedBlocks(counted(9), length=8)) == 1


# --- evaluation rows


@given(n_tokens=st.integers(2, 80), window=windows())
@quick
def test_evaluation_predicts_every_token_but_the_first_once(n_tokens, window):
    blocks = PackedBlocks(counted(n_tokens), **window)
    predicted = []
    for row in range(len(blocks)):
        item = blocks[row]
        wanted = item["targets"] != IGNORE
        assert wanted.any()
        # the token before a target is the one that it follows in the text
        assert torch.equal(item["targets"][wanted], item["tokens"][wanted] + 1)
        predicted += item["targets"][wanted].tolist()
    assert sorted(predicted) == list(range(2, n_tokens + 1))


@given(n_tokens=st.integers(2, 80), window=windows())
@quick
def test_each_token_after_the_first_row_is_predicted_from_at_least_length_minus_stride_before_it(n_tokens, window):
    blocks = PackedBlocks(counted(n_tokens), **window)
    for row in range(1, len(blocks)):
        first = (blocks[row]["targets"] != IGNORE).nonzero()[0].item()
        assert first == window["length"] - window["stride"]
        assert blocks[row]["tokens"][: first + 1].tolist() == list(
            range(row * window["stride"] + 1, row * window["stride"] + first + 2)
        )


@pytest.mark.parametrize("document_start", [None, END])
def test_the_padding_row_counts_for_nothing_and_has_the_parts_of_a_row(document_start):
    blocks = PackedBlocks(counted(30), length=8, stride=4, document_start=document_start)
    padding, row = blocks[PADDING_ROW], blocks[0]
    assert padding["targets"].tolist() == [IGNORE] * 8
    assert padding["rows"] == PADDING_ROW
    assert {name: np.shape(value) for name, value in padding.items()} == {
        name: np.shape(value) for name, value in row.items()
    }


def test_evaluation_knows_words_and_bytes_per_predicted_token_and_training_does_not():
    item = PackedBlocks(counted(61), length=8, stride=8)[0]
    assert item["words_per_token"] == 30 / 60
    assert item["bytes_per_token"] == 120 / 60
    assert "words_per_token" not in PackedBlocks(counted(61), length=8)[0]


def test_an_evaluation_split_without_text_is_refused():
    with pytest.raises(ValueError, match="the evaluation split has no text"):
        PackedBlocks(counted(1), length=8, stride=8)


# --- documents


@given(tokens=st.lists(st.integers(0, 2), min_size=9, max_size=60), stride=st.sampled_from([None, 3, 8]))
@quick
def test_a_document_begins_at_each_end_of_text_token(tokens, stride):
    blocks = PackedBlocks(Split(tokens), length=8, stride=stride, document_start=END)
    for row in range(len(blocks)):
        item = blocks[row]
        begins = torch.diff(item["documents"], prepend=torch.tensor([0]))
        assert torch.equal(begins == 1, item["tokens"] == END)
        assert set(begins.tolist()) <= {0, 1}


def test_documents_are_given_only_where_they_are_asked_for():
    assert "documents" not in PackedBlocks(counted(30), length=8)[0]


# --- the data module


@pytest.fixture
def spec(prose) -> CorpusSpec:
    return CorpusSpec(path=str(prose), tokenizer_size=300, validation_fraction=0.1)


def module(spec: CorpusSpec, cache, **options) -> LanguageModelingData:
    data = LanguageModelingData(
        spec, **{"block_length": 16, "batch_size": 4, "seed": 1, "cache_dir": str(cache), **options}
    )
    data.prepare()
    return data


def test_batches_stack_the_rows_of_their_split(spec, prepared):
    data = module(spec, prepared, document_mask=True, eval_stride=8, eval_batch_size=3)
    for loader, split, size in ((data.train_dataloader(), "train", 4), (data.val_dataloader(), "validation", 3)):
        for batch in islice(loader, 3):
            assert batch["tokens"].shape == batch["targets"].shape == batch["documents"].shape == (size, 16)
            for i, row in enumerate(batch["rows"].tolist()):
                assert torch.equal(batch["tokens"][i], data.dataset(split)[row]["tokens"])
                assert torch.equal(batch["targets"][i], data.dataset(split)[row]["targets"])


def test_a_validation_pass_predicts_as_many_tokens_as_the_split_has_and_counts_its_words(spec, prepared):
    data = module(spec, prepared, eval_stride=5)
    split = data.corpus.split("validation")
    tokens = words = 0
    for batch in data.val_dataloader():
        predicted = (batch["targets"] != IGNORE).sum(1)
        tokens += predicted.sum().item()
        words += (predicted * batch["words_per_token"]).sum().item()
    assert tokens == len(split) - 1
    assert words == pytest.approx(split.counts.words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 0}, r"block_length \(0\) must be at least 1"),
        ({"eval_stride": 0}, r"eval_stride \(0\) must be between 1 and block_length \(16\)"),
        ({"eval_stride": 17}, r"eval_stride \(17\) must be between 1 and block_length \(16\)"),
    ],
)
def test_windows_that_make_no_sense_are_refused(spec, options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelingData(spec, **{"block_length": 16, "batch_size": 4, "seed": 1, **options})


def test_data_that_are_not_prepared_say_how_to_prepare_them(spec, tmp_path):
    data = LanguageModelingData(spec, 16, 4, 1, cache_dir=str(tmp_path))
    assert not data.prepared
    with pytest.raises(ValueError, match=r"is not prepared in .*; run `python train\.py prepare`"):
        _ = data.vocab_size


@pytest.mark.parametrize("change", ["block_length", "corpus"])
def test_a_resume_on_other_rows_is_refused_with_both_fingerprints(spec, prepared, change):
    data = module(spec, prepared)
    if change == "block_length":
        other = module(spec, prepared, block_length=8)
    else:
        other = module(CorpusSpec(path=spec.path, tokenizer_size=290, validation_fraction=0.1), prepared)
    with pytest.raises(ValueError, match=rf"trained on data {data.fingerprint()}, but these are {other.fingerprint()}"):
        other.load_state_dict(data.state_dict())


def test_a_resume_with_another_seed_is_refused_with_the_one_to_use(spec, prepared):
    state = module(spec, prepared).state_dict()
    with pytest.raises(ValueError, match=r"seed=1, the config says 2; resume with seed 1"):
        module(spec, prepared, seed=2).load_state_dict(state)


def test_how_rows_are_evaluated_does_not_matter_to_a_resume(spec, prepared):
    data = module(spec, prepared)
    module(spec, prepared, eval_stride=4, eval_batch_size=2, num_workers=1).load_state_dict(data.state_dict())
