"""Where documents come from, and how they are cut into pieces."""

from __future__ import annotations

import json
import random
import time
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mhe_lightning.data.pieces import Piece, cut
from mhe_lightning.data.sources import FileSource, HubSource, open_source
from mhe_lightning.data.tokenizer import train_tokenizer

TITLE = r"^ = [^=].* = \n?$"


def write_parquet(file: Path, **columns: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def texts(source, split="train") -> list[str]:
    return [piece.text for piece in source.pieces(split)]


def make_mirror(folder: Path, subsets=("small",)) -> Path:
    for subset in subsets:
        write_parquet(folder / subset / "train-0.parquet", text=[f"{subset} one", f"{subset} two"])
        write_parquet(folder / subset / "validation-0.parquet", text=[f"{subset} held out"])
    configs = "".join(
        f"- config_name: {subset}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {subset}/{split}-*\n" for split in ("train", "validation"))
        for subset in subsets
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# A mirror\n")
    return folder


# --- cutting documents into pieces

PROSE = st.text(alphabet="ab'.9é日 \t\n\r\u0301\u00a0Σς#", max_size=120)


@cache
def trained(kind: str) -> Tokenizer:
    return train_tokenizer(["ab ab. ab'ab 9é日 a\nb\n\na Σ ab\t\tba", "é日 ab.\nab' \n\n ba"] * 3, kind, 300)


@given(text=PROSE, limit=st.integers(1, 12), chunk=st.integers(1, 20))
@settings(deadline=None, max_examples=300)
def test_pieces_tokenize_as_the_whole_text_does(text, limit, chunk):
    pieces = list(cut([text[i : i + chunk] for i in range(0, len(text), chunk)], limit))
    assert "".join(piece.text for piece in pieces) == (text if text.strip() else "")
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
    for kind in ("bpe", "wordpiece"):
        whole = trained(kind).encode(text).ids if text.strip() else []
        assert [i for piece in pieces for i in trained(kind).encode(piece.text).ids] == whole


def test_a_long_text_is_cut_after_lines():
    text = "".join(f"line {i}\n" for i in range(1000))
    pieces = list(cut([text], limit=100))
    assert all(piece.text.endswith("\n") and 100 <= len(piece.text) < 120 for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == text


def test_paragraphs_between_blank_lines_are_cut_too_but_later():
    pieces = list(cut(["word " * 10 + "\n\n"] * 100, limit=100))
    assert len(pieces) > 20
    assert max(len(piece.text) for piece in pieces) < 300


def test_a_text_without_any_space_stays_whole():
    assert list(cut(["x" * 50] * 100, limit=10)) == [Piece("x" * 5000, True)]


def test_cutting_takes_no_more_chunks_than_it_needs():
    taken = 0

    def chunks():
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield "some line\n" * 10

    next(cut(chunks(), limit=1000))
    assert taken <= 12


def test_a_text_without_a_place_to_cut_costs_linear_time():
    began = time.monotonic()
    list(cut(["x" * 1000] * 20_000, limit=1000))
    assert time.monotonic() - began < 5


# --- local files


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert list(open_source(str(tmp_path / "a.txt")).pieces("train")) == [Piece("one\n\ntwo\n", True)]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n')
    assert texts(open_source(str(tmp_path))) == ["two", "one"]


def test_rows_of_jsonl_json_and_parquet_are_documents_and_blank_ones_are_skipped(tmp_path):
    rows = ["one", "", " \n", None, "two"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([{"text": row} for row in rows], indent=1))
    write_parquet(tmp_path / "c.parquet", text=rows)
    for name in ("a.jsonl", "b.json", "c.parquet"):
        pieces = list(open_source(str(tmp_path / name)).pieces("train"))
        assert pieces == [Piece("one", True), Piece("two", True)]


def test_a_parquet_file_of_one_row_group_is_not_held_in_memory(tmp_path):
    draw = random.Random(0)
    file = write_parquet(tmp_path / "a.parquet", text=[draw.randbytes(500).hex() for _ in range(20_000)])
    assert pyarrow.parquet.ParquetFile(file).num_row_groups == 1
    before = pyarrow.total_allocated_bytes()
    most = max(pyarrow.total_allocated_bytes() for _ in open_source(str(file)).pieces("train")) - before
    assert most < file.stat().st_size / 2


def test_document_start_joins_the_rows_of_a_document_as_lines(tmp_path):
    rows = ["", " = One = \n", "", " text \n", " = = Part = = \n", "no newline", " = Two = \n", "end"]
    file = write_parquet(tmp_path / "a.parquet", text=rows)
    assert list(open_source(str(file), document_start=TITLE).pieces("train")) == [
        Piece("\n = One = \n\n text \n = = Part = = \nno newline\n", True),
        Piece(" = Two = \nend\n", True),
    ]


def test_a_folder_and_a_pattern_are_read_in_sorted_order(tmp_path):
    for name in ("b/2.txt", "a.txt", "b/1.txt", "ignored.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(open_source(str(tmp_path))) == ["a.txt", "b/1.txt", "b/2.txt"]
    assert texts(open_source(str(tmp_path / "b" / "*.txt"))) == ["b/1.txt", "b/2.txt"]


def test_the_identity_of_files_changes_with_an_edit(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = open_source(str(tmp_path)).identity()
    assert open_source(str(tmp_path)).identity() == before
    (tmp_path / "a.txt").write_text("other")
    assert open_source(str(tmp_path)).identity() != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", r"a\.txt is not UTF-8 text \(.* 0xe9\)"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "ok"}\n{"body": "x"}\n', r"a\.jsonl, line 2 has no column 'text'.*body"),
        ("a.jsonl", b'{"text": "ok"}\n"x"\n', r"a\.jsonl, line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: 'text' holds a int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: 'text' is not valid Unicode"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl, line 1 is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl.* is not valid JSON"),
        ("a.json", b'[{"text": "ok"}, {}]', r"a\.json, row 2 has no column 'text'"),
        ("a.parquet", b"PAR1 nonsense", r"a\.parquet is not a readable parquet file"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(open_source(str(tmp_path / name)))


def test_a_missing_or_unfit_parquet_column_is_named_with_the_columns(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", body=["x"], number=[1])
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text'.*body, number"):
        texts(open_source(str(file)))
    with pytest.raises(ValueError, match="column 'number' holds int64, not text"):
        texts(open_source(str(file), text_column="number"))


@pytest.mark.parametrize("path", ["./absent", "absent.txt", "/absent/*.txt", "a/b/c", "not a name"])
def test_a_path_to_nothing_is_refused(path):
    with pytest.raises(ValueError, match=r"does not exist|matches no file"):
        open_source(path)


def test_an_unusable_folder_or_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no file that ends in"):
        open_source(str(tmp_path))
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.pdf is of an unknown kind"):
        open_source(str(tmp_path / "a.pdf"))


def test_a_folder_of_files_named_by_split_is_not_taken_for_training_data(tmp_path):
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"named by split \(validation\.jsonl"):
        open_source(str(tmp_path))


def test_a_document_start_that_is_no_pattern_is_refused():
    with pytest.raises(ValueError, match=r"document_start \('\('\)"):
        open_source("embedded", document_start="(")


# --- Hub data sets and mirrors


def test_a_folder_is_a_mirror_by_its_header_or_by_the_names_of_its_parquet_files(tmp_path):
    assert isinstance(open_source(str(make_mirror(tmp_path / "a"))), HubSource)
    write_parquet(tmp_path / "b" / "train-00000.parquet", text=["x"])
    assert isinstance(open_source(str(tmp_path / "b")), HubSource)
    write_parquet(tmp_path / "c" / "training.parquet", text=["x"])
    assert isinstance(open_source(str(tmp_path / "c")), FileSource)
    (tmp_path / "c" / "README.md").write_text("# Notes\nconfigs: none\n")
    assert isinstance(open_source(str(tmp_path / "c")), FileSource)


@pytest.mark.parametrize("folder", ["owner/corpus", "corpus"])
def test_a_hub_name_is_read_from_its_mirror_below_the_data_root(tmp_path, monkeypatch, folder):
    make_mirror(tmp_path / folder)
    by_path = open_source(str(tmp_path / folder))
    monkeypatch.setenv("MHE_DATA_ROOT", str(tmp_path))
    by_name = open_source("owner/corpus")
    assert by_name.splits() == by_path.splits() == ("train", "validation")
    assert by_name.identity() == by_path.identity()
    for split in by_name.splits():
        assert texts(by_name, split) == texts(by_path, split)
    assert texts(by_name) == ["small one", "small two"]


def test_a_mirror_with_several_subsets_asks_for_one_and_lists_them(tmp_path):
    folder = str(make_mirror(tmp_path / "many", subsets=("red", "blue")))
    with pytest.raises(ValueError, match=r"set subset to one of red, blue"):
        texts(open_source(folder))
    with pytest.raises(ValueError, match=r"no subset 'green'; it has red, blue"):
        texts(open_source(folder, subset="green"))
    assert texts(open_source(folder, subset="blue")) == ["blue one", "blue two"]


def test_a_missing_split_or_column_of_a_mirror_is_refused_with_those_there_are(tmp_path):
    folder = str(make_mirror(tmp_path / "some"))
    with pytest.raises(ValueError, match="no split 'test'; it has train, validation"):
        texts(open_source(folder), "test")
    with pytest.raises(ValueError, match="no column 'body'; set text_column to one of text"):
        texts(open_source(folder, text_column="body"))


def test_a_damaged_file_of_a_mirror_is_reported_with_the_data_set_and_split(tmp_path):
    folder = make_mirror(tmp_path / "broken")
    (folder / "small" / "train-0.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(ValueError, match="broken"):
        texts(open_source(str(folder)))


@pytest.mark.parametrize("offline", ["1", ""])
def test_an_unreachable_hub_fails_within_seconds_in_one_line(monkeypatch, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing answers
    monkeypatch.delenv("MHE_DATA_ROOT", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"owner/corpus .*MHE_DATA_ROOT") as error:
        texts(open_source("owner/corpus"))
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 5


def test_a_hub_name_has_an_identity_without_a_network(monkeypatch):
    monkeypatch.delenv("MHE_DATA_ROOT", raising=False)
    first = open_source("owner/corpus", subset="a", revision="main").identity()
    assert first == {"hub": "owner/corpus", "subset": "a", "revision": "main"}


# --- the embedded corpus


def test_the_embedded_corpus_is_prose_of_about_two_megabytes():
    source = open_source("embedded")
    documents = texts(source)
    assert 1_500_000 < sum(map(len, documents)) < 4_000_000
    assert any("The Zen of Python" in document or "assert" in document for document in documents)
    assert source.splits() == ("train",)
    assert source.identity() == open_source("embedded").identity()


def test_an_embedded_split_other_than_train_is_refused():
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        texts(open_source("embedded"), "test")


# --- real data


@pytest.mark.real_data
def test_wikitext_rows_become_articles(real_data):
    source = open_source(str(real_data / "wikitext"), document_start=TITLE)
    ends = {split: sum(piece.ends_document for piece in source.pieces(split)) for split in ("train", "test")}
    assert ends == {"train": 125, "test": 18}
