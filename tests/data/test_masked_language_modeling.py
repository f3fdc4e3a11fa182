"""Packed tokens as rows with masked tokens, to train on and to evaluate."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mhe_lightning.data import CorpusSpec, MaskedLanguageModelingData, verify_certificate
from mhe_lightning.data.masked_language_modeling import IGNORE, MaskedBlocks
from mhe_lightning.data.masking import Masking
from mhe_lightning.data.sampler import PADDING_ROW
from mhe_lightning.data.tokenizer import BERT_SPECIAL_TOKENS, train_tokenizer

quick = settings(deadline=None, max_examples=150)
CLS, SEP, MASK = 2, 3, 4
SIZE = 12


class Split:
    """Tokens in memory that are read as a packed split is: with a separator before, between and after documents."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.tokens = np.array([SEP, *(token for document in documents for token in [*document, SEP])])

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= len(self)
        return self.tokens[start:stop].copy()


def masking(share: float = 0.15) -> Masking:
    words = [chr(ord("a") + i) for i in range(SIZE - 5)]
    vocabulary = {token: i for i, token in enumerate([*BERT_SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(BERT_SPECIAL_TOKENS))
    return Masking(tokenizer, share=share)


MASKING = masking()


def blocks(documents: list[list[int]], *, length: int = 8, seed: int | None = None, share=None, **options):
    chosen = MASKING if share is None else masking(share)
    return MaskedBlocks(Split(documents), length=length, masking=chosen, start=CLS, separator=SEP, seed=seed, **options)


def unmasked(item: dict) -> list[int]:
    """The row as it was."""
    return torch.where(item["targets"] == IGNORE, item["tokens"], item["targets"]).tolist()


DOCUMENTS = st.lists(st.lists(st.integers(5, SIZE - 1), min_size=1, max_size=20), min_size=1, max_size=8)
LENGTHS = st.integers(3, 14)


# --- which tokens a row has


@given(documents=DOCUMENTS, length=LENGTHS)
@quick
def test_evaluation_rows_hold_the_text_once_between_cls_and_sep(documents, length):
    data = blocks(documents, length=length)
    text = []
    for row in range(len(data)):
        item = data[row]
        real = np.array(unmasked(item))[item["padding"].numpy()].tolist()
        assert real[0] == CLS
        assert real[-1] == SEP
        assert len(real) == length or row == len(data) - 1
        text += real[1:-1]
    assert text == data.split.tokens[1:-1].tolist()


@given(documents=DOCUMENTS, length=LENGTHS, epoch=st.integers(0, 3))
@quick
def test_training_rows_hold_the_text_once_up_to_a_last_part(documents, length, epoch):
    tokens = sum(map(len, documents)) + len(documents) - 1
    if tokens < length - 2:
        with pytest.raises(ValueError, match="less than one row"):
            blocks(documents, length=length, seed=1)
        return
    data = blocks(documents, length=length, seed=1)
    rows = [unmasked(data[row, epoch]) for row in range(len(data))]
    assert all(row[0] == CLS and row[-1] == SEP and len(row) == length for row in rows)
    assert [token for row in rows for token in row[1:-1]] == data.split.tokens[
        1 : 1 + len(rows) * (length - 2)
    ].tolist()
    assert 0 <= tokens - len(rows) * (length - 2) < length - 2


@given(documents=DOCUMENTS, length=LENGTHS, document_mask=st.booleans(), seed=st.sampled_from([None, 1]))
@quick
def test_what_follows_a_rows_first_separator_is_segment_1_unless_documents_are_apart(
    documents, length, document_mask, seed
):
    documents = [*documents, [5] * length]  # enough for a training row
    data = blocks(documents, length=length, document_mask=document_mask, seed=seed)
    for row in range(len(data)):
        item = data[row]
        tokens = unmasked(item)
        first = tokens.index(SEP)
        expected = [int(i > first and not document_mask) for i in range(length)]
        real = item["padding"].tolist() if seed is None else [True] * length
        assert [s for s, r in zip(item["segments"].tolist(), real, strict=True) if r] == [
            s for s, r in zip(expected, real, strict=True) if r
        ]


def test_the_separator_at_the_end_of_a_short_last_row_is_of_the_segment_before_it():
    item = blocks([[5, 6], [7]], length=8)[0]
    assert unmasked(item) == [CLS, 5, 6, SEP, 7, SEP, SEP, SEP]
    assert item["segments"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert item["padding"].tolist() == [True] * 6 + [False] * 2


@given(documents=DOCUMENTS, length=LENGTHS)
@quick
def test_a_document_goes_from_one_separator_to_the_next(documents, length):
    data = blocks(documents, length=length, document_mask=True)
    for row in range(len(data)):
        item = data[row]
        tokens = unmasked(item)
        assert item["documents"].tolist() == [tokens[:i].count(SEP) for i in range(length)]


def test_documents_are_given_only_where_they_are_asked_for():
    assert "documents" not in blocks([[5, 6, 7]])[0]


@given(documents=DOCUMENTS, length=LENGTHS)
@quick
def test_the_last_row_is_filled_up_on_the_right_and_nothing_is_predicted_there(documents, length):
    data = blocks(documents, length=length)
    item = data[len(data) - 1]
    left = len(data.split) - 2 - (len(data) - 1) * (length - 2)
    assert item["padding"].tolist() == [i < left + 2 for i in range(length)]
    assert bool((item["targets"][~item["padding"]] == IGNORE).all())
    assert not bool(item["ordinary"][~item["padding"]].any())


@given(documents=DOCUMENTS, length=LENGTHS)
@quick
def test_evaluation_says_which_tokens_are_ordinary_and_what_hides_one(documents, length):
    data = blocks(documents, length=length)
    for row in range(len(data)):
        item = data[row]
        assert item["ordinary"].tolist() == [token >= 5 for token in unmasked(item)]
        assert bool(item["ordinary"][item["targets"] != IGNORE].all())
        assert item["mask_token"] == MASK


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_padding_row_counts_for_nothing_and_has_the_parts_of_a_row(document_mask):
    data = blocks([[5, 6, 7, 8, 9]] * 5, document_mask=document_mask)
    padding, row = data[PADDING_ROW], data[0]
    assert padding["targets"].tolist() == [IGNORE] * 8
    assert not bool(padding["ordinary"].any())
    assert bool(padding["padding"].any())  # a row that may attend to nothing at all is asking for NaN
    assert padding["rows"] == PADDING_ROW
    assert {name: (np.shape(value), getattr(value, "dtype", int)) for name, value in padding.items()} == {
        name: (np.shape(value), getattr(value, "dtype", int)) for name, value in row.items()
    }


def test_training_has_no_more_than_it_needs():
    assert set(blocks([[5] * 20], seed=1)[0, 0]) == {"tokens", "targets", "segments", "rows"}


@pytest.mark.parametrize("seed", [None, 1])
def test_a_split_without_a_row_is_refused(seed):
    with pytest.raises(ValueError, match=r"the split has 0 tokens, less than one row of block_length - 2 = 6; lower"):
        blocks([], seed=seed)


# --- masks


@given(documents=DOCUMENTS, share=st.sampled_from([0.05, 0.15, 0.5]))
@quick
def test_the_share_of_each_rows_ordinary_tokens_is_predicted(documents, share):
    data = blocks(documents, share=share)
    for row in range(len(data)):
        item = data[row]
        ordinary = int(item["ordinary"].sum())
        assert (item["targets"] != IGNORE).sum() == (max(1, round(share * ordinary)) if ordinary else 0)


def masks(data: MaskedBlocks, epoch: int | None) -> list[list[int]]:
    keys = [row if epoch is None else (row, epoch) for row in range(len(data))]
    return [data[key]["targets"].tolist() for key in keys]


def test_training_masks_differ_between_epochs_and_seeds_and_are_the_same_each_time():
    text = [[5 + i % 7 for i in range(60)]] * 3
    first, second = blocks(text, length=32, seed=1), blocks(text, length=32, seed=2)
    assert len({str(masks(data, epoch)) for data in (first, second) for epoch in range(4)}) == 8
    assert masks(first, 2) == masks(blocks(text, length=32, seed=1), 2)


def test_the_same_tokens_are_masked_differently_in_different_rows():
    data = blocks([[5] * 300], length=32)
    assert len({str(mask) for mask in masks(data, None)[:-1]}) == len(data) - 1 > 5


# --- the data module


def spec(prose, **options) -> CorpusSpec:
    settings = {"tokenizer": "wordpiece", "tokenizer_size": 300, "validation_fraction": 0.1, **options}
    return CorpusSpec(path=str(prose), **settings)


def module(prose, cache, **options) -> MaskedLanguageModelingData:
    settings = {"block_length": 16, "batch_size": 8, "seed": 1, "cache_dir": str(cache), **options}
    data = MaskedLanguageModelingData(spec(prose), **settings)
    data.prepare()
    return data


def batches(loader, count: int | None = None) -> list[dict]:
    """Batches as plain values, to be compared."""
    return [{name: value.tolist() for name, value in batch.items()} for batch in islice(loader, count)]


def test_training_batches_are_the_rows_in_the_masks_of_their_epoch(prose, prepared):
    data = module(prose, prepared, batch_size=64, document_mask=True)
    dataset, order = data.dataset("train"), data.order()
    assert 2 * 64 < len(dataset) < 8 * 64
    position = 0
    for batch in islice(data.train_dataloader(), 8):  # into the second epoch
        for i, row in enumerate(batch["rows"].tolist()):
            epoch = position // len(dataset)
            assert row == order.rows(position, 1)[0]
            wanted = dataset[row, epoch]
            assert all(torch.equal(batch[name][i], wanted[name]) for name in wanted if name != "rows")
            position += 1
    assert position > len(dataset)


def test_each_row_is_masked_anew_in_the_second_epoch(prose, prepared):
    data = module(prose, prepared, batch_size=1, shuffle=False)
    n = len(data.dataset("train"))
    first, second = (data.dataset("train")[0, epoch] for epoch in (0, 1))
    loaded = list(islice(data.train_dataloader(), n + 1))
    assert loaded[0]["rows"] == loaded[n]["rows"] == 0
    assert torch.equal(loaded[0]["targets"][0], first["targets"])
    assert torch.equal(loaded[n]["targets"][0], second["targets"])
    assert not torch.equal(first["targets"], second["targets"])


@pytest.mark.parametrize("whole_words", [False, True])
def test_workers_change_no_batch(prose, prepared, whole_words):
    alone, helped = (
        module(prose, prepared, num_workers=workers, batch_size=64, whole_words=whole_words) for workers in (0, 2)
    )
    assert batches(helped.train_dataloader(), 8) == batches(alone.train_dataloader(), 8)
    assert batches(helped.val_dataloader()) == batches(alone.val_dataloader())


@pytest.mark.parametrize("trained", [1, 5])
def test_a_resumed_run_goes_on_with_the_same_batches(prose, prepared, trained):
    whole = batches(module(prose, prepared, batch_size=100).train_dataloader(), trained + 4)
    data = module(prose, prepared, batch_size=100)
    for batch in islice(data.train_dataloader(), trained):
        data.mark_trained(batch["rows"])
    state = json.loads(json.dumps(data.state_dict()))
    assert verify_certificate(state) == trained * 100
    resumed = module(prose, prepared, batch_size=100)
    resumed.load_state_dict(state)
    assert batches(resumed.train_dataloader(), 4) == whole[trained:]
    assert (trained + 4) * 100 > len(data.dataset("train"))  # into the second epoch


def test_validation_masks_are_the_same_whatever_the_seed(prose, prepared):
    first, second = (module(prose, prepared, seed=seed) for seed in (1, 2))
    assert batches(first.val_dataloader()) == batches(second.val_dataloader())
    assert batches(first.train_dataloader(), 1) != batches(second.train_dataloader(), 1)


@pytest.mark.parametrize("eval_batch_size", [3, 1000])
def test_a_validation_pass_holds_every_token_of_the_split_once(prose, prepared, eval_batch_size):
    data = module(prose, prepared, eval_batch_size=eval_batch_size)
    split = data.corpus.split("validation")
    text = []
    for batch in data.val_dataloader():
        originals = torch.where(batch["targets"] == IGNORE, batch["tokens"], batch["targets"])
        for tokens, real in zip(originals, batch["padding"], strict=True):
            text += tokens[real].tolist()[1:-1]
    assert text == split.read(1, len(split) - 1).tolist()


def test_whole_words_are_masked_whole(prose, tmp_path):
    letters = train_tokenizer(["a b c d e f g h i j k l m n o p q r s t u v w x y z ."] * 2, "wordpiece", 128)
    letters.save(str(tmp_path / "tokenizer.json"))  # every word is spelt, one letter a token
    corpus = spec(prose, tokenizer=str(tmp_path / "tokenizer.json"))
    data = MaskedLanguageModelingData(corpus, 64, 4, 1, mask_share=0.3, whole_words=True, cache_dir=str(tmp_path))
    data.prepare()
    pieces = {i for token, i in data.tokenizer.get_vocab().items() if token.startswith("##")}
    together = 0
    for batch in data.val_dataloader():
        originals = torch.where(batch["targets"] == IGNORE, batch["tokens"], batch["targets"])
        for tokens, targets in zip(originals.tolist(), batch["targets"].tolist(), strict=True):
            for i in range(1, len(tokens) - 1):
                if tokens[i] in pieces and tokens[i - 1] >= 5:
                    assert (targets[i] == IGNORE) == (targets[i - 1] == IGNORE)
                    together += targets[i] != IGNORE
    assert together > 0


@pytest.mark.parametrize(
    "change", [{"block_length": 8}, {"mask_share": 0.2}, {"whole_words": True}], ids=lambda change: next(iter(change))
)
def test_a_resume_on_other_rows_is_refused_with_both_fingerprints(prose, prepared, change):
    data, other = module(prose, prepared), module(prose, prepared, **change)
    with pytest.raises(ValueError, match=rf"trained on data {data.fingerprint()}, but these are {other.fingerprint()}"):
        other.load_state_dict(data.state_dict())


def test_how_rows_are_evaluated_and_loaded_does_not_matter_to_a_resume(prose, prepared):
    state = module(prose, prepared).state_dict()
    module(prose, prepared, eval_batch_size=2, num_workers=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 2}, r"block_length \(2\) must be at least 3: \[CLS\], a token and \[SEP\]"),
        ({"mask_share": 0.0}, r"mask_share \(0.0\) must be between 0 and 1"),
        ({"mask_share": 1.0}, r"mask_share \(1.0\) must be between 0 and 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(prose, options, message):
    with pytest.raises(ValueError, match=message):
        MaskedLanguageModelingData(spec(prose), **{"block_length": 16, "batch_size": 4, "seed": 1, **options})


@pytest.mark.parametrize(
    ("special", "message"),
    [([], r"no mask token; .* add \[MASK\]"), (["[MASK]"], r"no token that begins a sequence; .* add \[CLS\]")],
)
def test_a_tokenizer_that_lacks_a_special_token_is_refused_with_the_remedy(prose, tmp_path, special, message):
    tokenizer = train_tokenizer(["the cat sings"] * 4, "bpe", 257)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    corpus = spec(prose, tokenizer=str(tmp_path / "tokenizer.json"))
    data = MaskedLanguageModelingData(corpus, 16, 4, 1, cache_dir=str(tmp_path))
    data.prepare()
    with pytest.raises(ValueError, match=message):
        data.dataset("train")
