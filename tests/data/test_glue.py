"""GLUE's rows as examples, and its submission files."""

from __future__ import annotations

from typing import Any

import pytest

from mhe_lightning.data.glue import TASKS, GlueData
from mhe_lightning.data.sequences import SequenceFormat
from mhe_lightning.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(
    ["the quick brown fox jumps over the lazy dog?", "sphinx of black quartz"], "wordpiece", 200
)
ROWS = {
    # a row, the sequence that it becomes, its label
    "cola": ({"sentence": "the fox ran", "label": 1}, "[CLS] the fox ran [SEP]", 1.0),
    "sst2": ({"sentence": "a fine fox", "label": 0}, "[CLS] a fine fox [SEP]", 0.0),
    "mrpc": ({"sentence1": "a fox", "sentence2": "one fox", "label": 1}, "[CLS] a fox [SEP] one fox [SEP]", 1.0),
    "stsb": ({"sentence1": "a fox", "sentence2": "a dog", "label": 3.2}, "[CLS] a fox [SEP] a dog [SEP]", 3.2),
    "qqp": ({"question1": "a fox?", "question2": "a dog?", "label": 0}, "[CLS] a fox? [SEP] a dog? [SEP]", 0.0),
    "mnli": ({"premise": "a fox", "hypothesis": "a dog", "label": 2}, "[CLS] a fox [SEP] a dog [SEP]", 2.0),
    "qnli": ({"question": "a fox?", "sentence": "a dog", "label": 1}, "[CLS] a fox? [SEP] a dog [SEP]", 1.0),
    "rte": ({"sentence1": "a fox", "sentence2": "a dog", "label": 0}, "[CLS] a fox [SEP] a dog [SEP]", 0.0),
    "wnli": ({"sentence1": "a fox", "sentence2": "it ran", "label": 1}, "[CLS] a fox [SEP] it ran [SEP]", 1.0),
    "ax": ({"premise": "a fox", "hypothesis": "a dog", "label": 1}, "[CLS] a fox [SEP] a dog [SEP]", 1.0),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_row_becomes_this_sequence(task):
    row, text, label = ROWS[task]
    data = GlueData(task, batch_size=1, seed=0)
    (example,) = data.convert([{**row, "idx": 7}], ["row 0"], "part", "train", SequenceFormat(TOKENIZER, 64))
    (sequence,) = example["sequences"]
    assert TOKENIZER.decode(sequence, skip_special_tokens=False) == text
    first = text.index("[SEP]") + len("[SEP]")
    assert TOKENIZER.decode(sequence[: example["boundaries"][0]], skip_special_tokens=False) == text[:first]
    assert (example["label"], example["id"], example["part"]) == (label, "7", "part")
    assert example["length"] == len(sequence)


@pytest.mark.parametrize(("task", "hidden"), [("stsb", -1.0), ("rte", -1), ("rte", None), ("stsb", None)])
def test_a_hidden_label_is_none(task, hidden):
    data = GlueData(task, batch_size=1, seed=0)
    row = {"sentence1": "a fox", "sentence2": "a dog", "label": hidden, "idx": 0}
    (example,) = data.convert([row], ["row 0"], "", "test", SequenceFormat(TOKENIZER, 64))
    assert example["label"] is None


def rows(predictions: dict[int, Any], part: str = "") -> list[dict[str, Any]]:
    return [{"id": str(index), "part": part, "prediction": p} for index, p in predictions.items()]


FILES = {
    "cola": ("CoLA.tsv", "0\t0\n2\t0\n10\t1\n"),
    "sst2": ("SST-2.tsv", "0\t0\n2\t0\n10\t1\n"),
    "mrpc": ("MRPC.tsv", "0\t0\n2\t0\n10\t1\n"),
    "qqp": ("QQP.tsv", "0\t0\n2\t0\n10\t1\n"),
    "wnli": ("WNLI.tsv", "0\t0\n2\t0\n10\t1\n"),
    "mnli": ("MNLI-m.tsv", "0\tentailment\n2\tentailment\n10\tneutral\n"),
    "ax": ("AX.tsv", "0\tentailment\n2\tentailment\n10\tneutral\n"),
    "qnli": ("QNLI.tsv", "0\tentailment\n2\tentailment\n10\tnot_entailment\n"),
    "rte": ("RTE.tsv", "0\tentailment\n2\tentailment\n10\tnot_entailment\n"),
}


@pytest.mark.parametrize("task", FILES)
def test_a_submission_has_a_header_and_the_labels_names_in_the_order_of_the_index(task):
    name, lines = FILES[task]
    submission = GlueData(task, batch_size=1, seed=0).submission(rows({10: 1, 2: 0, 0: 0}))
    assert submission == {name: "index\tprediction\n" + lines}


def test_values_are_written_within_their_range():
    submission = GlueData("stsb", batch_size=1, seed=0).submission(rows({0: -0.2, 1: 5.1, 2: 2.71828}))
    assert submission == {"STS-B.tsv": "index\tprediction\n0\t0.000\n1\t5.000\n2\t2.718\n"}


def test_mnli_has_a_file_for_each_of_its_parts():
    data = GlueData("mnli", batch_size=1, seed=0)
    submission = data.submission(rows({1: 2, 0: 0}, "matched") + rows({0: 1}, "mismatched"))
    assert submission == {
        "MNLI-m.tsv": "index\tprediction\n0\tentailment\n1\tcontradiction\n",
        "MNLI-mm.tsv": "index\tprediction\n0\tneutral\n",
    }
