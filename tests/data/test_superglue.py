"""SuperGLUE's rows as examples, and its submission files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mhe_lightning.data.sequences import SequenceFormat
from mhe_lightning.data.superglue import TASKS, SuperGlueData
from mhe_lightning.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["the quick brown fox jumps over the lazy dog?", "sphinx's black quartz"], "wordpiece", 200)
PAIR = {"premise": "a fox", "hypothesis": "a dog"}
ON_PAIR = ["[CLS] a fox [SEP] a dog [SEP]"]
WIC = {"sentence1": "a box fox", "sentence2": "fox box", "start1": 2, "end1": 5, "start2": 4, "end2": 7, "label": 1}
WSC = {
    "text": "The old fox saw the dog because he ran",
    "span1_index": 1,
    "span1_text": "old fox",
    "span2_index": 7,
    "span2_text": "he",
    "label": 0,
}
ROWS: dict[str, tuple[dict[str, Any], list[str], float]] = {
    # a row, the sequences that it becomes, its label
    "boolq": ({"question": "a fox?", "passage": "a dog", "label": 1}, ["[CLS] a fox? [SEP] a dog [SEP]"], 1.0),
    "cb": ({**PAIR, "label": 2}, ON_PAIR, 2.0),
    "copa": (
        {"premise": "a fox ran", "choice1": "a dog", "choice2": "it is", "question": "cause", "label": 1},
        [
            "[CLS] a fox ran what was the cause of this? [SEP] a dog [SEP]",
            "[CLS] a fox ran what was the cause of this? [SEP] it is [SEP]",
        ],
        1.0,
    ),
    "multirc": (
        {
            "paragraph": "a fox ran",
            "question": "who?",
            "answer": "a fox",
            "idx": {"paragraph": 1, "question": 2, "answer": 3},
            "label": 1,
        },
        ["[CLS] a fox ran [SEP] who? a fox [SEP]"],
        1.0,
    ),
    "record": (
        {
            "passage": "a fox and a dog",
            "query": "the @placeholder ran",
            "entities": ["fox", "dog", "fox"],
            "answers": ["dog"],
            "idx": {"passage": 1, "query": 2},
        },
        ["[CLS] a fox and a dog [SEP] the fox ran [SEP]", "[CLS] a fox and a dog [SEP] the dog ran [SEP]"],
        1.0,
    ),
    "rte": ({**PAIR, "label": 0}, ON_PAIR, 0.0),
    "wic": (WIC, ["[CLS] a box fox [SEP] fox box [SEP]"], 1.0),
    "wsc": (WSC, ["[CLS] the old fox saw the dog because he ran [SEP]"], 0.0),
    "axb": ({"sentence1": "a fox", "sentence2": "a dog", "label": 1}, ON_PAIR, 1.0),
    "axg": ({**PAIR, "label": 1}, ON_PAIR, 1.0),
}


def convert(task: str, row: dict[str, Any], split: str = "train", max_length: int = 64) -> list[dict[str, Any]]:
    data = SuperGlueData(task, batch_size=1, seed=0)
    return data.convert([{"idx": 7, **row}], ["row 0"], "", split, SequenceFormat(TOKENIZER, max_length))


def written(sequence: list[int]) -> str:
    return TOKENIZER.decode(sequence, skip_special_tokens=False)


@pytest.mark.parametrize("task", TASKS)
def test_a_row_becomes_these_sequences(task):
    row, texts, label = ROWS[task]
    (example,) = convert(task, row)
    assert [written(sequence) for sequence in example["sequences"]] == texts
    assert example["label"] == label
    assert json.loads(example["id"]) == row.get("idx", 7)
    assert example["length"] == max(map(len, example["sequences"]))


@pytest.mark.parametrize("task", [task for task in TASKS if task != "record"])
def test_a_hidden_label_is_none(task):
    (example,) = convert(task, {**ROWS[task][0], "label": -1}, "test")
    assert example["label"] is None


# --- choices


@pytest.mark.parametrize(("question", "asked"), [("cause", "what was the cause of this?"), ("effect", "as a result?")])
def test_copa_asks_for_the_cause_or_the_effect(question, asked):
    (example,) = convert("copa", {**ROWS["copa"][0], "question": question})
    assert all(asked in written(sequence) for sequence in example["sequences"])


def test_copas_right_choice_is_its_label():
    assert convert("copa", {**ROWS["copa"][0], "label": 0})[0]["right"] == [0]
    assert convert("copa", ROWS["copa"][0])[0]["right"] == [1]
    assert convert("copa", {**ROWS["copa"][0], "label": -1}, "test")[0]["right"] == []


def test_records_choices_are_its_entities_each_once():
    (example,) = convert("record", ROWS["record"][0])
    assert example["choices"] == ["fox", "dog"]
    assert example["right"] == [1]
    assert example["answers"] == ["dog"]


def test_a_row_of_record_without_a_right_entity_teaches_nothing_but_is_evaluated():
    row = {**ROWS["record"][0], "answers": ["cat"]}
    assert convert("record", row, "train") == []
    (example,) = convert("record", row, "validation")
    assert (example["label"], example["right"]) == (1.0, [])


def test_a_row_of_record_without_answers_has_a_hidden_label():
    assert convert("record", {**ROWS["record"][0], "answers": []}, "test")[0]["label"] is None


@pytest.mark.parametrize("values", [{"entities": []}, {"query": "the dog ran"}])
def test_a_row_of_record_without_entities_or_placeholder_is_named(values):
    with pytest.raises(ValueError, match=r"row 0: a row needs entities and a query with @placeholder; correct or"):
        convert("record", {**ROWS["record"][0], **values})


# --- groups


def test_answers_to_one_question_are_of_one_group():
    (example,) = convert("multirc", ROWS["multirc"][0])
    assert example["group"] == "1/2"


def test_sentences_that_differ_in_gender_only_follow_each_other():
    groups = [convert("axg", {**PAIR, "label": 0, "idx": idx})[0]["group"] for idx in range(6)]
    assert groups == ["0", "0", "1", "1", "2", "2"]


# --- spans


def covered(example: dict[str, Any]) -> list[str]:
    (sequence,), spans = example["sequences"], example["spans"]
    return [TOKENIZER.decode(sequence[start:end]) for start, end in zip(spans[::2], spans[1::2], strict=True)]


def test_wics_spans_cover_the_word_in_each_sentence():
    (example,) = convert("wic", WIC)
    assert covered(example) == ["box", "box"]
    assert example["spans"][1] <= example["boundaries"][0] <= example["spans"][2]


def test_wscs_spans_are_counted_in_words():
    assert covered(convert("wsc", WSC)[0]) == ["old fox", "he"]


def test_wscs_spans_may_be_split_into_tokens_by_their_punctuation():
    row = {**WSC, "text": "Then Fox's dog -- he -- ran", "span1_index": 1, "span1_text": "Fox's", "span2_index": 4}
    first, second = covered(convert("wsc", row)[0])
    assert first.replace(" ", "") == "fox's"
    assert second == "he"


@pytest.mark.parametrize("values", [{"end1": 10}, {"start2": 9, "end2": 12}, {"start1": 5, "end1": 5}, {"start1": -1}])
def test_a_span_of_wic_outside_of_its_sentence_is_named(values):
    with pytest.raises(ValueError, match=r"row 0: characters -?\d+ to \d+, which the label is about, lie outside"):
        convert("wic", {**WIC, **values})


@pytest.mark.parametrize("values", [{"span2_index": 9}, {"span1_index": -1}, {"span1_text": " "}])
def test_a_span_of_wsc_outside_of_its_text_is_named(values):
    with pytest.raises(ValueError, match=r"row 0: span[12] is \d words from word -?\d+, but the text has 9; correct"):
        convert("wsc", {**WSC, **values})


def test_a_span_that_was_cut_off_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"row 0: characters \d+ to \d+, .* cut off; raise max_length"):
        convert("wsc", WSC, max_length=6)


# --- submission files


def submission(task: str, rows: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    ((name, text),) = SuperGlueData(task, batch_size=1, seed=0).submission(rows).items()
    assert text.endswith("\n")
    return name, [json.loads(line) for line in text.splitlines()]


LABELS = {
    "boolq": ("BoolQ", "true"),
    "cb": ("CB", "contradiction"),
    "copa": ("COPA", 1),
    "rte": ("RTE", "not_entailment"),
    "wic": ("WiC", "true"),
    "wsc": ("WSC", "True"),
    "axb": ("AX-b", "not_entailment"),
    "axg": ("AX-g", "not_entailment"),
}


@pytest.mark.parametrize("task", LABELS)
def test_a_submission_has_a_line_per_row_in_the_order_of_the_index(task):
    name, label = LABELS[task]
    rows = [{"id": str(index), "prediction": 1} for index in (10, 2)]
    assert submission(task, rows) == (f"{name}.jsonl", [{"idx": 2, "label": label}, {"idx": 10, "label": label}])


def test_multircs_submission_nests_answers_in_questions_in_paragraphs():
    def row(paragraph: int, question: int, answer: int, prediction: int) -> dict[str, Any]:
        return {
            "id": json.dumps({"paragraph": paragraph, "question": question, "answer": answer}),
            "prediction": prediction,
        }

    rows = [row(1, 5, 12, 1), row(0, 3, 7, 0), row(0, 2, 6, 1), row(0, 2, 5, 0), row(1, 4, 11, 1)]
    name, lines = submission("multirc", rows)
    assert name == "MultiRC.jsonl"
    assert lines == [
        {
            "idx": 0,
            "passage": {
                "questions": [
                    {"idx": 2, "answers": [{"idx": 5, "label": 0}, {"idx": 6, "label": 1}]},
                    {"idx": 3, "answers": [{"idx": 7, "label": 0}]},
                ]
            },
        },
        {
            "idx": 1,
            "passage": {
                "questions": [
                    {"idx": 4, "answers": [{"idx": 11, "label": 1}]},
                    {"idx": 5, "answers": [{"idx": 12, "label": 1}]},
                ]
            },
        },
    ]


def test_records_submission_has_the_entity_itself():
    rows = [
        {"id": json.dumps({"passage": 9, "query": query}), "prediction": 0, "predicted_text": text}
        for query, text in ((31, "Fern"), (30, "Cleo"))
    ]
    expected = [{"idx": 30, "label": "Cleo"}, {"idx": 31, "label": "Fern"}]
    assert submission("record", rows) == ("ReCoRD.jsonl", expected)
