"""Packing a corpus, opening it again, and everything that can go wrong in between."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import socket
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from mhe_lightning import files as files_module
from mhe_lightning.data import corpus as corpus_module
from mhe_lightning.data import packing
from mhe_lightning.data.assignment import Turns
from mhe_lightning.data.corpus import CorpusSpec, find_corpus, prepare
from mhe_lightning.data.packed import CorpusError, PackedSplit, open_corpus
from mhe_lightning.data.pieces import Piece
from mhe_lightning.data.tokenizer import train_tokenizer

GIVEN = {"train": "train", "validation": "validation", "test": "test"}


def document(number: int) -> str:
    return f"Document {number} tells of {'many ' * (number % 5)}things.\nIts second line ends here."


def write_rows(file: Path, rows: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [document(i) for i in range(200)])


def small(path: Path | str, **options) -> CorpusSpec:
    return CorpusSpec(**{"path": str(path), "tokenizer_size": 300, "validation_fraction": 0.1, **options})


def pack(spec: CorpusSpec, cache: Path):
    return prepare(spec, cache, progress=False)


def documents_of(corpus, split: str) -> list[str]:
    """Decode a split back into its documents."""
    tokens = corpus.split(split).read(0, len(corpus.split(split)))
    ends = np.flatnonzero(tokens == corpus.end_of_text_id)
    assert ends[0] == 0
    assert ends[-1] == len(tokens) - 1
    return [corpus.tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(ends)]


# --- what is packed


def test_a_split_is_each_document_between_end_of_text_tokens(rows, tmp_path):
    corpus = pack(small(rows), tmp_path / "cache")
    train, validation = documents_of(corpus, "train"), documents_of(corpus, "validation")
    assert len(train) == 180
    assert validation == [document(i) for i in range(9, 200, 10)]
    assert [d for d in (document(i) for i in range(200)) if d not in validation] == train


def test_pieces_of_a_long_document_are_packed_without_a_seam(tmp_path):
    text = "".join(f"{document(i)}\n" for i in range(3000))
    (tmp_path / "long.txt").write_text(text)
    corpus = pack(small(tmp_path / "long.txt", validation_fraction=0), tmp_path / "cache")
    assert documents_of(corpus, "train") == [text]
    whole = corpus.tokenizer.encode(text, add_special_tokens=False).ids
    np.testing.assert_array_equal(corpus.split("train").read(1, len(whole) + 1), whole)


def test_a_single_long_text_file_is_split_by_pieces_with_an_end_on_both_sides(tmp_path):
    text = "".join(f"{document(i)}\n" for i in range(10_000))
    (tmp_path / "long.txt").write_text(text)
    corpus = pack(small(tmp_path / "long.txt", test_fraction=0.1), tmp_path / "cache")
    parts = {split: documents_of(corpus, split) for split in ("train", "validation", "test")}
    assert all(part in text for split in parts.values() for part in split)
    assert sum(len(part) for split in parts.values() for part in split) == len(text)
    assert min(map(len, parts.values())) >= 1


def test_given_splits_and_separate_files_are_used_as_they_are(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ["one", "two"])
    validation = write_rows(tmp_path / "other.jsonl", ["two", "three"])
    corpus = pack(small(train, validation_path=str(validation)), tmp_path / "cache")
    assert documents_of(corpus, "train") == ["one", "two"]
    assert documents_of(corpus, "validation") == ["two", "three"]


def test_deduplication_keeps_evaluation_splits_whole_and_takes_their_documents_out_of_training(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ["one", "two", "one", "four"])
    validation = write_rows(tmp_path / "other.jsonl", ["two", "three", "three"])
    corpus = pack(small(train, validation_path=str(validation), deduplicate=True), tmp_path / "cache")
    assert documents_of(corpus, "train") == ["one", "four"]
    assert documents_of(corpus, "validation") == ["two", "three"]
    removed = {split: entry["duplicates_removed"] for split, entry in corpus.manifest["splits"].items()}
    assert removed == {"train": 2, "validation": 1}


def test_no_document_is_on_both_sides_of_a_split_that_is_cut_here(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [document(i % 20) for i in range(200)])
    corpus = pack(small(file), tmp_path / "cache")
    train, validation = documents_of(corpus, "train"), documents_of(corpus, "validation")
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 20


@given(validation=st.floats(0.01, 0.45), test=st.floats(0.01, 0.45), count=st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_held_out_shares_are_met_to_within_a_document(validation, test, count):
    turns = Turns({"validation": validation, "test": test})
    taken = [turns.next() for _ in range(count)]
    assert abs(taken.count("validation") - validation * count) <= 1
    assert abs(taken.count("test") - test * count) <= 2


def test_a_piece_that_is_followed_by_a_duplicate_ends_its_document(tmp_path, monkeypatch):
    pieces = [Piece("a\n", False), Piece("b\n", False), Piece("a\n", False), Piece("c\n", True)]
    monkeypatch.setattr("mhe_lightning.data.sources.FileSource.pieces", lambda self, split: iter(pieces))
    (tmp_path / "any.txt").write_text("x")
    spec = small(tmp_path / "any.txt", validation_fraction=0, deduplicate=True)
    assert list(spec.assignment().pieces()) == [
        ("train", Piece("a\n", False)),
        ("train", Piece("b\n", True)),
        ("train", Piece("c\n", True)),
    ]


def test_words_count_one_end_of_line_for_each_line(tmp_path):
    lines = [" = Title = \n", "", " a b <unk> \n", ""]
    file = write_rows(tmp_path / "rows.jsonl", lines)
    by_article = pack(small(file, document_start="^ = ", validation_fraction=0), tmp_path / "cache")
    assert by_article.split("train").counts.words == 3 + 3 + 4
    file = write_rows(tmp_path / "plain.jsonl", ["two words", "three\nmore words\n"])
    by_row = pack(small(file, validation_fraction=0), tmp_path / "cache")
    assert by_row.split("train").counts.words == 5 + 3
    assert by_row.split("train").counts.bytes == 9 + 17


def test_a_document_cannot_forge_an_end_of_text_token(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ["before <|endoftext|> after"])
    corpus = pack(small(file, validation_fraction=0), tmp_path / "cache")
    assert documents_of(corpus, "train") == ["before <|endoftext|> after"]


def test_the_tokenizer_is_trained_on_the_training_split_only(tmp_path):
    train = write_rows(tmp_path / "a.jsonl", ["plain words"] * 9)
    validation = write_rows(tmp_path / "b.jsonl", ["zzzzzzzz"] * 9)
    corpus = pack(small(train, validation_path=str(validation)), tmp_path / "cache")
    assert corpus.tokenizer.token_to_id("zz") is None
    assert corpus.tokenizer.token_to_id("wor") is not None


def test_training_the_tokenizer_stops_at_its_limit_of_text(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(corpus_module, "TOKENIZER_TRAINING_BYTES", 500)
    texts = corpus_module._training_texts(small(rows).assignment(), lambda size: None)
    assert 500 <= sum(map(len, texts)) < 700


def test_a_tokenizer_file_is_used_as_it_is_and_its_change_makes_another_corpus(rows, tmp_path):
    file = tmp_path / "tokenizer.json"
    train_tokenizer(["some words"] * 3, "wordpiece", 200).save(str(file))
    spec = small(rows, tokenizer=str(file))
    corpus = pack(spec, tmp_path / "cache")
    assert corpus.end_of_text_id == 3
    before = spec.fingerprint()
    train_tokenizer(["other words"] * 3, "wordpiece", 200).save(str(file))
    assert spec.fingerprint() != before


def test_a_vocabulary_beyond_16_bits_is_packed_in_32(tmp_path):
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "low": 2, "high": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    file = write_rows(tmp_path / "rows.jsonl", ["low high"])
    corpus = pack(small(file, tokenizer=str(tmp_path), validation_fraction=0), tmp_path / "cache")
    assert corpus.manifest["dtype"] == "<u4"
    assert corpus.vocab_size == 70_001
    assert corpus.split("train").read(0, 4).tolist() == [1, 2, 70_000, 1]


def test_packing_twice_gives_the_same_bytes(rows, tmp_path):
    first, second = (pack(small(rows), tmp_path / name) for name in ("a", "b"))
    assert first.manifest == second.manifest


def test_a_mirror_and_its_hub_name_give_the_same_tokens(tmp_path, monkeypatch):
    (tmp_path / "mirrors" / "tiny").mkdir(parents=True)
    for split in GIVEN:
        table = pyarrow.table({"text": [f"{split} {document(i)}" for i in range(9)]})
        pyarrow.parquet.write_table(table, tmp_path / "mirrors" / "tiny" / f"{split}-00000-of-00001.parquet")
    by_path = pack(small(tmp_path / "mirrors" / "tiny", splits=GIVEN), tmp_path / "cache")
    monkeypatch.setenv("MHE_DATA_ROOT", str(tmp_path / "mirrors"))
    by_name = pack(small("owner/tiny", splits=GIVEN), tmp_path / "cache")
    assert by_name.manifest["splits"] == by_path.manifest["splits"]
    assert list(by_name.manifest["splits"]) == ["train", "validation", "test"]


def test_only_a_few_batches_are_read_ahead(monkeypatch):
    monkeypatch.setattr(packing, "BATCH_BYTES", 1000)
    tokenizer = train_tokenizer([], "bpe", 300)
    taken = 0

    def pieces():
        nonlocal taken
        for number in range(10_000):
            taken += 1
            yield "train", Piece(document(number), True)

    encoded = packing.encoded(packing.in_batches(pieces()), tokenizer, threads=2)
    for number in range(1, 6):
        batch, tokens = next(encoded)
        assert len(batch) == len(tokens) < 30
        assert taken < 30 * (number + 2)
    encoded.close()


# --- reading


def write_split(folder: Path, shard_lengths: list[int]) -> PackedSplit:
    total = sum(shard_lengths)
    shards, start = [], 0
    for number, length in enumerate(shard_lengths):
        np.arange(start, start + length, dtype="<u2").tofile(folder / f"s{number}.bin")
        shards.append({"file": f"s{number}.bin", "tokens": length})
        start += length
    entry = {"tokens": total, "documents": 1, "words": 1, "bytes": 1, "shards": shards}
    return PackedSplit(folder, entry, "<u2")


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
@settings(deadline=None, max_examples=60)
def test_reading_goes_across_shards(tmp_path_factory, lengths, data):
    split = write_split(tmp_path_factory.mktemp("shards"), lengths)
    start = data.draw(st.integers(0, len(split)))
    stop = data.draw(st.integers(start, len(split)))
    tokens = split.read(start, stop)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == list(range(start, stop))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11)])
def test_reading_outside_of_a_split_is_refused(tmp_path, start, stop):
    with pytest.raises(ValueError, match="it has 10 tokens"):
        write_split(tmp_path, [4, 6]).read(start, stop)


def test_a_split_travels_to_workers_without_its_maps(tmp_path):
    split = write_split(tmp_path, [4000, 6000])
    split.read(0, 10_000)
    data = pickle.dumps(split)
    assert len(data) < 2000
    assert pickle.loads(data).read(3999, 4001).tolist() == [3999, 4000]


def test_shards_hold_at_most_shard_tokens_and_read_as_one(rows, tmp_path):
    one = pack(small(rows), tmp_path / "cache").split("train")
    many = pack(small(rows, shard_tokens=100), tmp_path / "cache")
    shards = many.manifest["splits"]["train"]["shards"]
    assert [shard["tokens"] for shard in shards[:-1]] == [100] * (len(shards) - 1)
    np.testing.assert_array_equal(many.split("train").read(0, len(one)), one.read(0, len(one)))


def test_an_unknown_split_is_refused_with_the_known_ones(rows, tmp_path):
    with pytest.raises(ValueError, match="no split 'test'; it has train, validation"):
        pack(small(rows), tmp_path / "cache").split("test")


# --- reuse, damage, interruption


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_a_second_prepare_uses_the_corpus_of_the_first(rows, tmp_path, capsys):
    first = pack(small(rows), tmp_path / "cache")
    before = state(first.folder)
    assert state(pack(small(rows), tmp_path / "cache").folder) == before
    assert find_corpus(small(rows), tmp_path / "cache") == first.folder
    assert capsys.readouterr().err == ""


def test_an_edited_source_or_option_makes_another_corpus(rows, tmp_path):
    first = pack(small(rows), tmp_path / "cache")
    write_rows(rows, ["all", "new", "text"] * 20 + [document(i) for i in range(30)])
    assert find_corpus(small(rows), tmp_path / "cache") is None
    assert pack(small(rows), tmp_path / "cache").folder != first.folder
    assert small(rows).fingerprint() != small(rows, tokenizer_size=301).fingerprint()


def test_an_option_without_effect_makes_no_other_corpus(rows, tmp_path):
    file = tmp_path / "tokenizer.json"
    train_tokenizer([], "bpe", 300).save(str(file))
    copy = tmp_path / "copy.json"
    copy.write_bytes(file.read_bytes())
    given = {"validation_path": str(rows), "tokenizer": str(file)}
    one = small(rows, **given).fingerprint()
    assert small(rows, **given, validation_fraction=0.3).fingerprint() == one
    assert small(rows, **{**given, "tokenizer": str(copy)}, tokenizer_size=500).fingerprint() == one
    assert small(rows, **given, test_fraction=0.3).fingerprint() != one


def truncate(folder: Path) -> None:
    shard = folder / "train-00000.bin"
    os.truncate(shard, shard.stat().st_size - 2)


def flip_a_byte(folder: Path) -> None:
    shard = folder / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def remove_a_shard(folder: Path) -> None:
    (folder / "validation-00000.bin").unlink()


def swap_the_tokenizer(folder: Path) -> None:
    train_tokenizer(["different words"] * 9, "bpe", 300).save(str(folder / "tokenizer.json"))


def break_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format_version": 1, "splits": {')


def empty_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format_version": 1, "splits": {"train": {}}, "tokenizer": 3}')


def raise_the_version(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"train-00000\.bin has \d+ bytes instead of \d+; run prepare again"),
        (flip_a_byte, r"train-00000\.bin is damaged.*; run prepare again"),
        (remove_a_shard, r"validation-00000\.bin is missing; run prepare again"),
        (swap_the_tokenizer, r"tokenizer\.json: this tokenizer does not match the shards; run prepare again"),
        (break_the_manifest, r"manifest\.json is damaged .*; run prepare again"),
        (empty_the_manifest, r"manifest\.json is damaged .*; run prepare again"),
        (raise_the_version, r"manifest\.json has format version 99, .*; run prepare again"),
    ],
)
def test_damage_is_named_when_opening_and_repaired_by_prepare(rows, tmp_path, capsys, damage, message):
    corpus = pack(small(rows), tmp_path / "cache")
    good = {file.name: file.read_bytes() for file in corpus.folder.iterdir()}
    damage(corpus.folder)
    with pytest.raises(CorpusError, match=message) as error:
        open_corpus(corpus.folder)
    assert "\n" not in str(error.value)
    capsys.readouterr()
    assert pack(small(rows), tmp_path / "cache").folder == corpus.folder
    assert capsys.readouterr().err.startswith("prepare: building the corpus anew, because")
    assert {file.name: file.read_bytes() for file in corpus.folder.iterdir()} == good
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [corpus.folder.name]


def test_a_flipped_byte_passes_only_where_verification_is_switched_off(rows, tmp_path):
    corpus = pack(small(rows), tmp_path / "cache")
    flip_a_byte(corpus.folder)
    open_corpus(corpus.folder, verify=False)


def test_a_folder_without_a_corpus_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"manifest\.json cannot be read .*; run prepare first"):
        open_corpus(tmp_path)


def test_a_killed_prepare_leaves_nothing_finished_and_the_next_one_cleans_up(rows, tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # a fresh process would import for seconds
    built = fork.Event()
    with monkeypatch.context() as patch:
        patch.setattr(files_module, "_publish", lambda *folders: (built.set(), time.sleep(60)))
        child = fork.Process(target=pack, args=(small(rows), tmp_path / "cache"))
        child.start()
    assert built.wait(30)
    child.kill()
    child.join()
    leftovers = list((tmp_path / "cache").iterdir())
    assert len(leftovers) == 1
    assert find_corpus(small(rows), tmp_path / "cache") is None
    corpus = pack(small(rows), tmp_path / "cache")
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [corpus.folder.name]


def test_a_failed_prepare_leaves_no_trace(rows, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_module, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pack(small(rows), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_of_two_runs_at_once_the_later_one_uses_the_corpus_of_the_other(rows, tmp_path, monkeypatch):
    build = corpus_module._build
    winners = []

    def slow_build(*args, **kwargs):
        build(*args, **kwargs)
        monkeypatch.setattr(corpus_module, "_build", build)
        winners.append(pack(small(rows), tmp_path / "cache").folder)
        winners.append(state(winners[0]))

    monkeypatch.setattr(corpus_module, "_build", slow_build)
    loser = pack(small(rows), tmp_path / "cache")
    assert loser.folder == winners[0]
    assert state(loser.folder) == winners[1]
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [loser.folder.name]


def test_the_temporary_folder_of_a_living_process_is_left_alone(rows, tmp_path):
    other = tmp_path / "cache" / f".x-0.tmp-{socket.gethostname()}-{os.getppid()}-00000000"
    elsewhere = tmp_path / "cache" / ".x-0.tmp-elsewhere-1-00000000"
    for folder in (other, elsewhere):
        folder.mkdir(parents=True)
    pack(small(rows), tmp_path / "cache")
    assert other.exists()
    assert elsewhere.exists()


# --- nothing to pack, and options that make no sense


@pytest.mark.parametrize("rows", [[], [""], ["  \n", "\t"]])
@pytest.mark.parametrize("tokenizer", ["bpe", "file"])
def test_an_empty_corpus_is_refused_with_its_name_and_split(tmp_path, rows, tokenizer):
    if tokenizer == "file":
        train_tokenizer([], "bpe", 300).save(str(tmp_path / "tokenizer.json"))
        tokenizer = str(tmp_path / "tokenizer.json")
    file = write_rows(tmp_path / "empty.jsonl", rows)
    with pytest.raises(CorpusError, match=r"empty\.jsonl has no text for the split train"):
        pack(small(file, tokenizer=tokenizer), tmp_path / "cache")


def test_a_handful_of_rows_can_be_split_and_too_few_say_what_to_do(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ["one", "two", "three", "four", "five"])
    with pytest.raises(CorpusError, match="no text for the split validation; raise validation_fraction"):
        pack(small(file), tmp_path / "cache")
    corpus = pack(small(file, validation_fraction=0.2), tmp_path / "cache")
    assert documents_of(corpus, "validation") == ["five"]


def test_a_split_the_source_lacks_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        pack(small(rows, splits={"train": "train", "test": "test"}), tmp_path / "cache")


def test_all_bad_options_are_reported_at_once():
    with pytest.raises(ValueError, match=r"tokenizer_size: vocab_size \(3\)") as error:
        CorpusSpec(
            path="x",
            splits={"train": None, "dev": "dev", "test": "test"},
            test_path="t.txt",
            validation_fraction=1.5,
            shard_tokens=0,
            tokenizer_size=3,
        )
    for part in ("dev", "no training split", "test_path", "validation_fraction (1.5)", "shard_tokens (0)"):
        assert part in str(error.value)


def test_plain_progress_goes_to_stderr_with_a_rate(rows, tmp_path, capsys):
    prepare(small(rows), tmp_path / "cache")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "prepare: tokenizing, 0.0 MB" in captured.err
    assert "MB/s" in captured.err


# --- real data


@pytest.mark.real_data
def test_wikitext_is_packed_article_by_article(real_data, tmp_path):
    spec = CorpusSpec(
        path=str(real_data / "wikitext"),
        document_start=r"^ = [^=].* = \n?$",
        splits=GIVEN,
        tokenizer_size=1000,
    )
    corpus = pack(spec, tmp_path)
    assert {split: corpus.split(split).counts.documents for split in ("train", "test")} == {
        "train": 125,
        "test": 18,
    }
    assert all("\n = " in article or article.startswith(" = ") for article in documents_of(corpus, "test"))
