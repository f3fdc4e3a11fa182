"""SQuAD: windows cover their context, targets are the answer's tokens, offsets give the text back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhe_lightning.data import SquadData
from mhe_lightning.data.squad import central_spans, window_spans
from mhe_lightning.metrics.squad import normalize_answer

LONG = " ".join(f"The {n} river begins below stone {n} and sings to the bird." for n in "one two three four".split())  # noqa: SIM905
MARKED = "Beyonce\u0301 met Zoë at café 東京タワー, with 🎉👍🏽 and naïve\u200d friends."
ANSWERS = pyarrow.struct({"text": pyarrow.list_(pyarrow.string()), "answer_start": pyarrow.list_(pyarrow.int32())})
SCHEMA = pyarrow.schema(
    {"id": "string", "title": "string", "context": "string", "question": "string", "answers": ANSWERS}
)


def row(id, context, question, *texts, start=None):
    starts = [context.index(text) if start is None else start for text in texts]
    answers = {"text": list(texts), "answer_start": starts}
    return {"id": id, "title": "t", "context": context, "question": question, "answers": answers}


TRAIN = [
    row("a", LONG, "What sings?", "The one river"),
    row("b", LONG, "Below what does the four river begin?", "stone four"),
    row("c", MARKED, "Who met Zoë?", "Beyonce\u0301"),
    row("d", MARKED, "Where?", "東京タワー"),
    row("e", MARKED, "With what?", "🎉👍🏽"),
    row("f", "The bird sings.", "", "bird"),
]
VALIDATION = [
    row("v", LONG, "What is below?", "stone two", "stone one"),
    row("w", "The bird sings.", "Who sings?", "The bird", "bird", "bird"),
]
NONE = row("n", LONG, "What is the sea?")


def write(folder: Path, train=TRAIN, validation=VALIDATION, schema=SCHEMA) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("validation", validation)):
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def make(tmp_path: Path, train=TRAIN, validation=VALIDATION, schema=SCHEMA, **options) -> SquadData:
    options = {"max_length": 32, "stride": 8, "max_question_length": 8, "tokenizer": "wordpiece", **options}
    path = write(tmp_path / "source", train, validation, schema)
    data = SquadData(
        batch_size=4, seed=0, tokenizer_size=300, path=str(path), cache_dir=str(tmp_path / "cache"), **options
    )
    data.prepare()
    return data


def windows_of(data: SquadData, split: str) -> dict[str, list[dict]]:
    """The windows of a split by question, as they are collated alone."""
    found: dict[str, list[dict]] = {}
    dataset = data.dataset(split)
    for i in range(len(dataset)):
        batch = data.collate([dataset[i]])
        found.setdefault(batch["info"][0]["id"], []).append(batch)
    return found


def target_text(window) -> str:
    offsets = window["info"][0]["offsets"]
    return window["info"][0]["context"][offsets[window["starts"][0], 0] : offsets[window["ends"][0], 1]]


# Windows


@given(n=st.integers(1, 60), room=st.integers(1, 25), step=st.integers(1, 25))
def test_windows_cover_every_token_and_each_has_its_maximum_context_in_one(n, room, step):
    step = min(step, room)
    windows = window_spans(n, room, step)
    central = central_spans(windows)

    assert [first for first, _ in windows] == [i * step for i in range(len(windows))]
    assert all(stop - first == room for first, stop in windows[:-1])
    assert windows[-1][1] == n
    assert all(stop < n for _, stop in windows[:-1])  # none is needless
    assert sorted(t for first, stop in central for t in range(first, stop)) == list(range(n))
    for token in range(n):
        context = [
            min(token - a, b - 1 - token) + 0.01 * (b - a) if a <= token < b else -1 for a, b in windows
        ]  # BERT's, in floating point
        (own,) = [i for i, (first, stop) in enumerate(central) if first <= token < stop]
        assert context[own] == pytest.approx(max(context))
        assert all(score < max(context) - 1e-9 for score in context[:own])


def test_windows_of_a_question(tmp_path):
    data = make(tmp_path)
    tokenizer = data.tokenizer
    windows = windows_of(data, "validation")
    assert len(windows["v"]) > 3
    assert len(windows["w"]) == 1

    context = tokenizer.encode(LONG, add_special_tokens=False)
    question = tokenizer.encode("What is below?", add_special_tokens=False).ids[:8]
    head = [tokenizer.token_to_id("[CLS]"), *question, tokenizer.token_to_id("[SEP]")]
    room = 32 - len(head) - 1
    seen = np.zeros(len(context.ids), dtype=int)
    for i, window in enumerate(windows["v"]):
        part = slice(i * 8, min(i * 8 + room, len(context.ids)))
        tokens = window["tokens"][0].tolist()
        assert tokens == [*head, *context.ids[part], tokenizer.token_to_id("[SEP]")]
        assert window["segments"][0].tolist() == [0] * len(head) + [1] * (len(tokens) - len(head))
        inside = torch.zeros(len(tokens), dtype=torch.bool)
        inside[len(head) : -1] = True
        assert torch.equal(window["allowed"][0], inside)
        assert window["info"][0]["offsets"][len(head) : -1].tolist() == [list(o) for o in context.offsets[part]]
        assert not window["info"][0]["offsets"][~inside.numpy()].any()
        assert not (window["allowed_starts"] & ~window["allowed"]).any()
        seen[part] += window["allowed_starts"][0, len(head) : -1].numpy()
    assert (seen == 1).all()


def test_a_long_question_is_cut_and_counted(tmp_path):
    data = make(tmp_path, max_question_length=3)
    encoded = data.tokenizer.encode("What is below?", add_special_tokens=False).ids
    (window, *_) = windows_of(data, "validation")["v"]

    assert window["tokens"][0, 1:4].tolist() == encoded[:3]
    assert data.describe()["splits"]["validation"]["truncated"] > 0


# Answers


@pytest.mark.parametrize("tokenizer", ["wordpiece", "bpe"])
def test_targets_are_the_tokens_of_the_first_answer(tmp_path, tokenizer):
    data = make(tmp_path, tokenizer=tokenizer)
    for split, rows in (("train", TRAIN), ("validation", VALIDATION)):
        windows = windows_of(data, split)
        for source in rows:
            answer = source["answers"]["text"][0]
            found = [target_text(w) for w in windows[source["id"]] if w["starts"][0] > 0]
            assert found
            assert set(found) == {answer}
            without = [w for w in windows[source["id"]] if w["starts"][0] == 0]
            assert all(w["ends"][0] == 0 for w in without)
            assert not without or source["context"] == LONG or tokenizer == "bpe"


@pytest.mark.parametrize("tokenizer", ["wordpiece", "bpe"])
@given(text=st.text(min_size=1, max_size=40), seed=st.integers(0, 10**6))
def test_tokens_of_any_text_hold_characters_of_it(tmp_path_factory, tokenizer, text, seed):
    from mhe_lightning.data.squad import _characters, _tokens_at
    from mhe_lightning.data.tokenizer import train_tokenizer

    trained = _TOKENIZERS.setdefault(
        tokenizer, train_tokenizer([MARKED, LONG] * 2, tokenizer, 300) if tokenizer not in _TOKENIZERS else None
    )
    offsets = _characters(trained.encode(text, add_special_tokens=False), text)

    for start, end in offsets.tolist():
        assert 0 <= start <= end <= len(text)
        assert text[start:end] == text[start:end].strip()
    start = seed % len(text)
    end = start + 1 + seed % (len(text) - start)
    found = _tokens_at(offsets, start, end)
    if found is not None:
        held = range(offsets[found[0], 0], offsets[found[1], 1])
        inside = {c for a, b in offsets.tolist() for c in range(a, b)} & set(range(start, end))
        assert inside <= set(held)


_TOKENIZERS: dict = {}


def test_an_answer_within_a_token_has_the_whole_token(tmp_path):
    context = "The birds sing. The birds sing."
    data = make(tmp_path, train=[row("x", context, "What?", "ird"), *TRAIN], tokenizer="wordpiece")
    (window,) = windows_of(data, "train")["x"]

    assert "ird" in target_text(window)
    assert window["starts"][0] > 0
    assert target_text(window) in ("birds", "bird", "ird", "irds")


def test_an_answer_of_dropped_characters_is_at_the_first_token(tmp_path):
    context = "The bird \u200d sings."
    (window,) = windows_of(make(tmp_path, train=[row("x", context, "What?", "\u200d"), *TRAIN]), "train")["x"]

    assert (window["starts"].item(), window["ends"].item()) == (0, 0)


def test_questions_without_an_answer(tmp_path):
    data = make(tmp_path, train=[*TRAIN, NONE], validation=[*VALIDATION, NONE], version="v2")

    assert data.unanswerable
    assert data.label == "squad-v2"
    for split in ("train", "validation"):
        for window in windows_of(data, split)["n"]:
            assert (window["starts"].item(), window["ends"].item()) == (0, 0)
            assert window["info"][0]["answers"] == []


def test_hidden_answers(tmp_path):
    hidden = [{**row("n", LONG, "What?"), "answers": None}, row("m", LONG, "What?")]
    data = make(tmp_path, validation=[*VALIDATION, *hidden])

    assert not data.unanswerable
    for id in ("n", "m"):
        for window in windows_of(data, "validation")[id]:
            assert window["starts"].item() == -1
            assert window["info"][0]["answers"] is None


def test_a_wrong_place_in_validation_leaves_the_answers_but_no_target(tmp_path):
    data = make(tmp_path, validation=[*VALIDATION, row("x", LONG, "What?", "stone one", start=1)])
    for window in windows_of(data, "validation")["x"]:
        assert window["starts"].item() == window["ends"].item() == -1
        assert window["info"][0]["answers"] == ["stone one"]


# Refusals


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (row("x", LONG, "What?", "stone", start=5), r"row 1: the context has 'ne ri' at answer_start \(5\)"),
        (row("x", LONG, "What?", "stone", start=-1), r"row 1: the context has .* at answer_start \(-1\)"),
        (row("x", LONG, "What?", "stone", start=10**6), r"row 1: the context has '' at answer_start"),
        (row("x", LONG, "What?", " ", start=3), r"row 1: the first answer \(' '\) is empty"),
        (row("x", LONG, "What?"), "row 1: the question has no answer.*version.* to v2"),
        (row("x", "", "What?"), r"row 1: .*"),
        (row("x", " \n", "What?", "\n"), "row 1: the first answer"),
        (
            {**row("x", LONG, "What?"), "answers": {"text": ["a", "b"], "answer_start": [0]}},
            "row 1: answers has 2 texts but 1 values",
        ),
        ({**row("x", LONG, "What?"), "answers": None}, "row 1: answers .* must have text"),
        ({**row("x", LONG, "What?"), "answers": {"text": None, "answer_start": [0]}}, "row 1: answers .* must have"),
        ({**row("x", LONG, "What?", "stone"), "question": None}, "row 1: question is None"),
        ({**row("x", LONG, "What?", "stone"), "id": None}, "row 1: id is None"),
    ],
)
def test_bad_training_rows_are_named(tmp_path, train, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, train=[TRAIN[0], train])


@pytest.mark.parametrize("context", ["", "  \n", "\u200d"])
def test_a_context_without_tokens_is_refused(tmp_path, context):
    with pytest.raises(ValueError, match=r"row 1: context .* has no token; correct or remove"):
        make(tmp_path, train=[TRAIN[0], row("x", context, "What?")], version="v2")


def test_an_id_of_two_questions_is_refused_in_evaluation(tmp_path):
    with pytest.raises(ValueError, match=r"row 2: id \('v'\) must be that of one question only"):
        make(tmp_path, validation=[*VALIDATION, VALIDATION[0]])
    data = make(tmp_path, train=[*TRAIN, TRAIN[0]])
    assert len(windows_of(data, "train")) == len(TRAIN)


def test_a_failed_preparation_can_be_repeated(tmp_path):
    path = write(tmp_path / "source", validation=[VALIDATION[0], VALIDATION[0]])
    data = SquadData(
        4, 0, path=str(path), tokenizer="bpe", tokenizer_size=300, cache_dir=str(tmp_path / "cache"), max_length=384
    )
    for _ in range(2):
        with pytest.raises(ValueError, match="row 1: id"):
            data.prepare()


@pytest.mark.parametrize("column", ["id", "context", "question", "answers"])
def test_a_missing_column_is_named(tmp_path, column):
    schema = pyarrow.schema([field for field in SCHEMA if field.name != column])
    with pytest.raises(ValueError, match=column):
        make(tmp_path, schema=schema)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v3"}, "version"),
        ({"stride": 318}, r"stride \(318\) must be from 1 to 317"),
        ({"stride": 0}, "stride"),
        ({"max_question_length": 0}, "max_question_length"),
        ({"max_length": 67}, r"max_length \(67\) leaves no room"),
        ({"splits": {"dev": "validation"}}, "splits"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SquadData(4, 0, **options)


# Batches


def test_a_batch_is_its_windows_padded(tmp_path):
    data = make(tmp_path)
    dataset = data.dataset("train")
    rows = [dataset[i] for i in range(len(dataset))]
    batch = data.collate(rows)
    assert not batch["padding"].all()
    for i, own in enumerate(rows):
        alone = data.collate([own])
        assert "padding" not in alone
        n = alone["tokens"].shape[1]
        for name in ("tokens", "segments", "allowed", "allowed_starts"):
            assert torch.equal(batch[name][i, :n], alone[name][0])
            assert not batch[name][i, n:].any()
        assert batch["padding"][i].sum() == n
        assert batch["starts"][i] == alone["starts"][0]
        assert batch["rows"][i] == i


def test_the_test_split_is_the_validation_split(tmp_path):
    data = make(tmp_path)
    assert data.table("test").equals(data.table("validation"))


@pytest.mark.parametrize("option", [{"stride": 7}, {"max_question_length": 7}, {"max_length": 31}, {"version": "v2"}])
def test_examples_are_made_anew_for_other_options(tmp_path, option):
    folder = make(tmp_path).folder
    assert make(tmp_path, **option).folder != folder


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_every_window_once(tmp_path, workers):
    data = make(tmp_path, num_workers=workers)
    rows = [r for batch in data.val_dataloader() for r in batch["rows"].tolist()]
    assert sorted(rows) == list(range(len(data.dataset("validation"))))


def test_submission(tmp_path):
    predictions = [
        {"id": "v", "prediction_text": "stone ë", "null_odds": -1.5},
        {"id": "w", "prediction_text": "", "null_odds": None},
    ]
    files = {name: json.loads(text) for name, text in make(tmp_path).submission(predictions).items()}
    assert files == {"predictions.json": {"v": "stone ë", "w": ""}}
    files = {name: json.loads(text) for name, text in make(tmp_path, version="v2").submission(predictions).items()}
    assert files["predictions.json"] == {"v": "stone ë", "w": ""}
    assert files["null_odds.json"]["v"] == -1.5
    assert 1e300 < files["null_odds.json"]["w"] < float("inf")


# Real data


@pytest.mark.real_data
@pytest.mark.parametrize(("version", "name"), [("v1", "squad"), ("v2", "squad_v2")])
def test_targets_of_real_answers(real_data, tmp_path, version, name):
    data = SquadData(
        32, 0, version, "wordpiece", path=str(real_data / name), cache_dir=str(tmp_path / "cache"), num_workers=0
    )
    data.prepare()
    found, equal = 0, 0
    for window in data.table("train").to_pylist():
        if window["start"] == 0:
            continue
        context = window["context"]
        first = window["first_characters"][window["start"] - window["boundary"]]
        last = window["last_characters"][window["end"] - window["boundary"]]
        found += 1
        equal += normalize_answer(context[first:last]) == normalize_answer(window["answers"][0])
    assert found > 100
    assert equal / found >= 0.99
