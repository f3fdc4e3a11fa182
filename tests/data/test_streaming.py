"""Training on a corpus that is tokenised while it is read."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mhe_lightning.data import CorpusSpec, StreamedLanguageModelingData, packing, verify_certificate
from mhe_lightning.data.corpus import find_corpus, prepare
from mhe_lightning.data.language_modeling import PackedBlocks
from mhe_lightning.data.streaming import StreamedBlocks
from mhe_lightning.data.tokenizer import load_tokenizer, train_tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer_file(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(prose.read_text().splitlines(), "bpe", 300).save(str(file))
    return str(file)


@pytest.fixture
def spec(prose, tokenizer_file) -> CorpusSpec:
    return CorpusSpec(path=str(prose), tokenizer=tokenizer_file, validation_fraction=0)


def packed(spec: CorpusSpec, cache: Path):
    return prepare(spec, cache, progress=False)


def rows(blocks, count: int) -> list[dict]:
    return list(islice(iter(blocks), count))


def streamed(spec: CorpusSpec, **options) -> StreamedBlocks:
    return StreamedBlocks(spec, load_tokenizer(spec.tokenizer), **{"length": LENGTH, "batch_size": 4, **options})


def module(spec: CorpusSpec, cache: Path, **options) -> StreamedLanguageModelingData:
    settings = {"block_length": LENGTH, "batch_size": 4, "seed": 1, "cache_dir": str(cache), "read_ahead": False}
    return StreamedLanguageModelingData(spec, **{**settings, **options})


def write_rows(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


# --- the training tokens of a specification


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"document_start": "the"},
        {"deduplicate": True},
        {"validation_fraction": 0.1, "test_fraction": 0.2},
        {"deduplicate": True, "validation_path": "other"},
    ],
    ids=str,
)
def test_training_tokens_are_what_the_training_split_is_packed_to(
    options, prose, tokenizer_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(packing, "BATCH_BYTES", 1500)
    texts = [json.loads(line)["text"] for line in prose.read_text().splitlines()]
    path = write_rows(tmp_path / "rows.jsonl", [*texts, "a <|endoftext|> b", *texts[:20]])
    if "validation_path" in options:
        options = {**options, "validation_path": write_rows(tmp_path / "other.jsonl", texts[30:50])}
    spec = CorpusSpec(path=path, tokenizer=tokenizer_file, **{"validation_fraction": 0, **options})
    corpus = packed(spec, tmp_path / "cache")
    batches = list(spec.training_tokens(corpus.tokenizer))
    assert len(batches) > 5
    assert all(batch.dtype == np.int64 for batch in batches)
    split = corpus.split("train")
    np.testing.assert_array_equal(np.concatenate([[corpus.end_of_text_id], *batches]), split.read(0, len(split)))


def test_other_splits_are_not_read_for_the_training_tokens(spec, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("not JSON")
    spec = dataclasses.replace(spec, validation_path=str(broken))
    assert sum(map(len, spec.training_tokens(load_tokenizer(spec.tokenizer)))) > 1000


# --- a corpus without its training split


def test_without_its_training_split_a_corpus_has_the_same_other_splits(prose, spec, tmp_path):
    spec = dataclasses.replace(spec, validation_path=str(prose))
    whole = packed(spec, tmp_path).manifest
    part = packed(dataclasses.replace(spec, pack_train=False), tmp_path).manifest
    assert part["splits"] == {"validation": whole["splits"]["validation"]}
    assert part["tokenizer"] == whole["tokenizer"]


def test_a_corpus_without_any_split_still_has_its_vocabulary(spec, tmp_path):
    data = module(spec, tmp_path)
    assert not data.prepared
    data.prepare()
    assert data.prepared
    assert data.vocab_size == data.tokenizer.get_vocab_size() == 300
    assert data.describe()["splits"] == {}
    with pytest.raises(ValueError, match="has no split 'validation'; it has none"):
        data.val_dataloader()


def test_the_training_files_do_not_matter_to_a_corpus_without_them(prose, spec, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ["one", "two"])
    spec = dataclasses.replace(spec, path=train, validation_path=str(prose), pack_train=False)
    folder = packed(spec, tmp_path / "cache").folder
    write_rows(tmp_path / "train.jsonl", ["one", "two", "three"])
    assert find_corpus(spec, tmp_path / "cache") == folder
    assert find_corpus(dataclasses.replace(spec, pack_train=True), tmp_path / "cache") is None


def test_what_cannot_be_without_a_packed_training_split_is_reported_at_once():
    with pytest.raises(ValueError, match=r"tokenizer to the path of a tokenizer\.json; .*no validation split") as error:
        CorpusSpec(path="x", pack_train=False, shard_tokens=0)
    assert "shard_tokens (0)" in str(error.value)


# --- rows


@pytest.mark.parametrize("batch_bytes", [300, 10**6])
def test_the_rows_of_a_first_pass_are_the_packed_ones_in_the_order_of_the_source(
    spec, tmp_path, monkeypatch, batch_bytes
):
    monkeypatch.setattr(packing, "BATCH_BYTES", batch_bytes)
    corpus = packed(spec, tmp_path)
    blocks = PackedBlocks(corpus.split("train"), length=LENGTH, document_start=corpus.end_of_text_id)
    for row, batch in enumerate(rows(streamed(spec, document_mask=True), len(blocks))):
        expected = blocks[row]
        assert batch.keys() == expected.keys()
        assert batch["rows"] == row
        for name in ("tokens", "targets", "documents"):
            assert torch.equal(batch[name], expected[name]), (row, name)


def test_documents_are_given_only_where_they_are_asked_for(spec):
    assert set(rows(streamed(spec), 1)[0]) == {"tokens", "targets", "rows"}


def test_after_the_last_document_the_first_follows(spec, tmp_path):
    split = packed(spec, tmp_path).split("train")
    stream = split.read(0, len(split))
    twice = np.concatenate([stream, stream[1:], stream[1:]])
    count = (len(twice) - 1) // LENGTH
    assert count > 2 * (len(stream) // LENGTH)
    for row, batch in enumerate(rows(streamed(spec), count)):
        window = twice[row * LENGTH : (row + 1) * LENGTH + 1].tolist()
        assert [*batch["tokens"].tolist(), int(batch["targets"][-1])] == window
        assert batch["targets"].tolist() == window[1:]


def test_a_corpus_shorter_than_a_row_is_repeated_within_it(tmp_path, tokenizer_file):
    spec = CorpusSpec(write_rows(tmp_path / "a.jsonl", ["the cat"]), tokenizer=tokenizer_file, validation_fraction=0)
    once = np.concatenate(list(spec.training_tokens(load_tokenizer(tokenizer_file))))
    tokens = rows(streamed(spec, length=50), 1)[0]["tokens"].tolist()
    assert tokens == [once[-1], *np.tile(once, 50)[:49]]


@pytest.mark.parametrize("start", [0, 1, 8, 300])
def test_a_start_skips_as_many_rows(spec, start):
    everything = rows(streamed(spec), start + 6)
    for got, expected in zip(rows(streamed(spec, start=start), 6), everything[start:], strict=True):
        assert got["rows"] == expected["rows"]
        assert torch.equal(got["tokens"], expected["tokens"])


@pytest.mark.parametrize("start", [0, 8, 12])  # 12: a run that went on with batches of 8 after some of 4
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_take_slices_of_every_global_batch(spec, world_size, start):
    size = 8 // world_size
    shares = [
        rows(streamed(spec, batch_size=8, rank=rank, world_size=world_size, start=start), 3 * size)
        for rank in range(world_size)
    ]
    for step in range(3):
        ids = [row["rows"] for share in shares for row in share[step * size : (step + 1) * size]]
        assert ids == list(range(start + 8 * step, start + 8 * step + 8))


def test_an_empty_source_is_refused(tmp_path, tokenizer_file):
    spec = CorpusSpec(write_rows(tmp_path / "empty.jsonl", ["", " "]), tokenizer=tokenizer_file, validation_fraction=0)
    with pytest.raises(ValueError, match=r"empty\.jsonl has no text in its training split; check"):
        next(iter(streamed(spec)))


def test_ranks_that_do_not_divide_the_batch_are_refused(spec):
    with pytest.raises(ValueError, match=r"batch_size \(4\) .* multiple of 3; try 6"):
        streamed(spec, world_size=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_batches_of_the_rows(spec, workers):
    blocks = streamed(spec, rank=1, world_size=2, document_mask=True)
    batches = list(islice(DataLoader(blocks, batch_size=2, num_workers=workers), 5))
    expected = rows(blocks, 10)
    assert [batch["rows"].tolist() for batch in batches] == [[4 * i + 2, 4 * i + 3] for i in range(5)]
    for name in ("tokens", "targets", "documents"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), torch.stack([row[name] for row in expected]))


# --- the data module


@pytest.mark.parametrize("read_ahead", [False, True])
def test_training_resumes_at_the_row_after_the_last_trained_one_and_certifies_it(prose, spec, tmp_path, read_ahead):
    spec = dataclasses.replace(spec, validation_path=str(prose))
    data = module(spec, tmp_path, read_ahead=read_ahead)
    data.prepare()
    loader = iter(data.train_dataloader())
    for _ in range(3):
        data.mark_trained(next(loader)["rows"])
    next(loader)  # loaded, but not trained
    state = data.state_dict()
    assert verify_certificate(state) == 12

    resumed = module(spec, tmp_path, batch_size=8)
    resumed.load_state_dict(state)
    batch = next(iter(resumed.train_dataloader()))
    assert batch["rows"].tolist() == list(range(12, 20))
    assert torch.equal(batch["tokens"], torch.stack([row["tokens"] for row in rows(streamed(spec, start=12), 8)]))
    resumed.mark_trained(batch["rows"])
    assert verify_certificate(resumed.state_dict()) == 20
    assert sum(len(batch["rows"]) for batch in resumed.val_dataloader()) > 0


def test_a_tokenizer_to_be_trained_is_refused(prose, tmp_path):
    spec = CorpusSpec(path=str(prose), tokenizer="bpe", validation_fraction=0)
    with pytest.raises(ValueError, match=r"corpus\.tokenizer \('bpe'\) must be the path of a tokenizer\.json"):
        module(spec, tmp_path)


def test_a_share_to_be_held_out_is_refused(spec, tmp_path):
    with pytest.raises(ValueError, match=r"nothing can be held out from a stream; .*corpus\.validation_path"):
        module(dataclasses.replace(spec, validation_fraction=0.1), tmp_path)


def test_another_block_length_is_refused_on_resume(spec, tmp_path):
    data, other = module(spec, tmp_path), module(spec, tmp_path, block_length=8)
    data.prepare()
    with pytest.raises(ValueError, match=f"{data.fingerprint()}, but these are {other.fingerprint()}"):
        other.load_state_dict(data.state_dict())
