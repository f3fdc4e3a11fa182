"""The candidates of the benchmark of `prepare` do the same work, and its table tells of them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import datasets
import numpy as np
import pytest

from mhe_lightning.data.packed import open_corpus
from mhe_lightning.data.tokenizer import train_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TEXTS = [f"Document {number} tells of {'many ' * (number % 5)}things." for number in range(300)]
BLOCK = 32


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("prepare_benchmark", FOLDER / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def corpus(benchmark, tmp_path) -> Path:
    benchmark.write_corpus(tmp_path / "corpus.parquet", TEXTS)
    train_tokenizer(TEXTS, "bpe", 300).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "corpus.parquet"


def run(benchmark, candidate: str, corpus: Path) -> dict:
    folder = corpus.parent / candidate
    folder.mkdir()
    tokenizer = corpus.parent / "tokenizer.json"
    made = benchmark.MAKERS[candidate](corpus, tokenizer, folder, processes=1, block_length=BLOCK)
    return made()


def test_prepare_and_the_bare_run_write_the_same_tokens(benchmark, corpus):
    ours, bare = (run(benchmark, name, corpus) for name in ("prepare", benchmark.BARE))
    assert ours["sha256"] == bare["sha256"]()
    assert ours["tokens"] == bare["tokens"] > len(TEXTS)


def test_the_lean_peer_gives_the_same_tokens_in_blocks(benchmark, corpus, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # it sets this
    kept = []
    original = datasets.Dataset.map
    monkeypatch.setattr(datasets.Dataset, "map", lambda *a, **k: kept.append(original(*a, **k)) or kept[-1])
    run(benchmark, "prepare", corpus)
    run(benchmark, benchmark.LEAN, corpus)
    ours = open_corpus(next((corpus.parent / "prepare").iterdir())).split("train")
    theirs = np.concatenate(kept[-1]["input_ids"])
    np.testing.assert_array_equal(ours.read(1, len(theirs) + 1), theirs)
    assert len(ours) - 1 - len(theirs) < BLOCK


def test_the_usual_peer_gives_all_tokens_but_the_ends_of_documents_and_what_fills_no_block(
    benchmark, corpus, monkeypatch
):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # it sets this
    ours, theirs = (run(benchmark, name, corpus)["tokens"] for name in ("prepare", benchmark.USUAL))
    assert 0 <= ours - 1 - len(TEXTS) - theirs < BLOCK


def test_memory_is_that_of_this_process_and_of_none_that_is_gone(benchmark):
    assert benchmark.memory_of_tree(os.getpid()) > 10_000_000
    assert benchmark.memory_of_tree(2**22 + 1) == 0


def test_varied_text_has_the_size_asked_for_and_is_the_same_each_time(benchmark):
    made = list(benchmark.varied(TEXTS, 20_000))
    assert 20_000 <= sum(map(len, made)) < 20_200
    assert len(set(made)) == len(made)
    assert made == list(benchmark.varied(TEXTS, 20_000))
    assert list(benchmark.varied(TEXTS, 0)) == TEXTS


def test_the_loader_is_timed_beside_a_step(benchmark, corpus):
    options = benchmark.arguments(["--batches", "2x16", "--rounds", "2", "--loads", "2", "--processes", "1"])
    options.folder, options.tokenizer = corpus.parent, corpus.parent / "tokenizer.json"
    (row,) = benchmark.compare_loading(options, corpus)
    assert row["loaded_tokens_per_second"]["median"] > row["step_tokens_per_second"]["median"]
    assert "| 2 × 16 |" in benchmark.table_of({"loading": [row]})
