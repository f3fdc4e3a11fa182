"""From batches of text to tokens and counts: the same as document by document, on all cores, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from mhe_lightning.data import packing
from mhe_lightning.data.corpus import CorpusSpec, prepare
from mhe_lightning.data.pieces import Piece
from mhe_lightning.data.tokenizer import end_of_text_id, train_tokenizer

TEXT = st.text(alphabet="ab'.é日 \t\n\r\x0b\x1c\x1f\0\x85\u00a0\u2003\u3000", max_size=60)


@cache
def tokenizer_file() -> str:
    file = Path(tempfile.mkdtemp()) / "tokenizer.json"
    train_tokenizer(["ab ab. ab'ab 日 a\nb\n\na ab\t\tba", "é日 ab.\nab' \n\n ba"] * 3, "bpe", 300).save(str(file))
    return str(file)


# --- the same as a naive oracle


@given(documents=st.lists(TEXT.filter(lambda text: text.strip()), min_size=2, max_size=12), size=st.integers(1, 200))
@settings(deadline=None, max_examples=40)
def test_a_split_is_what_encoding_and_counting_each_document_gives(tmp_path_factory, documents, size):
    folder = tmp_path_factory.mktemp("corpus")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    spec = CorpusSpec(str(rows), tokenizer=tokenizer_file(), validation_fraction=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BATCH_BYTES", size)
        corpus = prepare(spec, folder / "cache", progress=False)
    end = end_of_text_id(corpus.tokenizer)
    tokens = [end]
    for document in documents:
        tokens += [*corpus.tokenizer.encode(document, add_special_tokens=False).ids, end]
    entry = corpus.manifest["splits"]["train"]
    assert corpus.split("train").read(0, entry["tokens"]).tolist() == tokens
    lines = sum(text.count("\n") + (not text.endswith("\n")) for text in documents)
    assert {key: entry[key] for key in ("documents", "words", "bytes", "corpus_sha256")} == {
        "documents": len(documents),
        "words": sum(len(text.split()) for text in documents) + lines,
        "bytes": sum(len(text.encode()) for text in documents),
        "corpus_sha256": hashlib.sha256("".join(text + "\0" for text in documents).encode()).hexdigest(),
    }


@given(st.lists(st.one_of(TEXT, st.text(max_size=20), st.text(st.characters(max_codepoint=127), max_size=20))))
@settings(deadline=None, max_examples=200)
def test_words_are_those_that_split_gives(texts):
    assert packing.count_words(texts) == sum(len(text.split()) for text in texts)


def test_an_end_of_text_token_follows_the_last_piece_of_a_document_only():
    tokenizer = Tokenizer.from_file(tokenizer_file())
    end = end_of_text_id(tokenizer)
    batch = [("train", Piece("ab\n", False)), ("train", Piece("ba", True)), ("test", Piece("a", True))]
    first, second, third = (tokenizer.encode(piece.text).ids for _, piece in batch)
    ((same, tokens),) = packing.encoded([batch], tokenizer, "<u2")
    assert same is batch
    assert [own.tolist() for own in tokens] == [first, [*second, end], [*third, end]]
    assert {own.dtype for own in tokens} == {np.dtype("<u2")}
    parts = packing.by_split(batch, tokens)
    assert {split: own.tolist() for split, (_, own) in parts.items()} == {
        "train": [*first, *second, end],
        "test": [*third, end],
    }


# --- on all cores


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_come_in_order_and_one_more_than_the_threads_is_held(threads):
    tokenizer = Tokenizer.from_file(tokenizer_file())
    batches = [[("train", Piece("ab " * (number % 7 + 1), True))] for number in range(40)]
    taken = given_out = most = 0

    def source():
        nonlocal taken
        for batch in batches:
            taken += 1
            yield batch

    for batch, tokens in packing.encoded(source(), tokenizer, threads=threads):
        most = max(most, taken - given_out)
        assert batch is batches[given_out]
        assert tokens[0][:-1].tolist() == tokenizer.encode(batch[0][1].text).ids
        given_out += 1
    assert given_out == len(batches)
    assert most == threads + 1


def test_there_is_a_thread_for_each_core_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 7}, raising=False)
    assert packing.available_cores() == 3
    left = iter([[("train", Piece("ab", True))] for _ in range(100)])
    encoded = packing.encoded(left, Tokenizer.from_file(tokenizer_file()))
    next(encoded)
    encoded.close()
    assert len(list(left)) == 100 - 4


# --- in bounded memory


def write_large(file: Path, size: int) -> None:
    """A corpus of ``size`` characters, in one row group."""
    draw = random.Random(0)
    texts = [" ".join(draw.randbytes(25).hex() for _ in range(20)) for _ in range(size // 1000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=2**30)


def data_segment() -> int:
    """Bytes that count for RLIMIT_DATA."""
    return 1024 * int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def pack_limited(file: Path, folder: Path, spare: int, results) -> None:
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # others hold a gigabyte of addresses in reserve
    resource.setrlimit(resource.RLIMIT_DATA, (data_segment() + spare, resource.RLIM_INFINITY))
    try:
        file.read_bytes()
        results.put("the whole file fitted into the memory that was left")
    except MemoryError:
        spec = CorpusSpec(str(file), tokenizer=str(folder), validation_fraction=0)
        results.put(prepare(spec, folder / "cache", progress=False).manifest["splits"]["train"]["documents"])


@pytest.mark.slow
def test_a_corpus_larger_than_the_memory_is_packed(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    file = tmp_path / "large.parquet"
    spare = 64 * 2**20
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    # Written in a process of its own: what this one has freed, the one that packs could use beyond its limit.
    for target, args in ((write_large, (file, 150_000_000)), (pack_limited, (file, tmp_path, spare, results))):
        child = fork.Process(target=target, args=args)
        child.start()
        child.join(240)
        assert child.exitcode == 0
    assert file.stat().st_size > spare
    assert results.get() == 150_000
