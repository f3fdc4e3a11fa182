"""Every task of GLUE and SuperGLUE through the command line: trained, tested, and written as its benchmark asks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub_fixtures import SIZES

ON_TEST, DIAGNOSTIC = SIZES["test"], 6
NLI = ("entailment", "neutral", "contradiction")
ENTAILMENT = ("entailment", "not_entailment")
BINARY = ("0", "1")
GLUE = {
    # submission files of the task, and the labels in them
    "cola": (["CoLA.tsv"], BINARY),
    "sst2": (["SST-2.tsv"], BINARY),
    "mrpc": (["MRPC.tsv"], BINARY),
    "stsb": (["STS-B.tsv"], None),
    "qqp": (["QQP.tsv"], BINARY),
    "mnli": (["MNLI-m.tsv", "MNLI-mm.tsv"], NLI),
    "qnli": (["QNLI.tsv"], ENTAILMENT),
    "rte": (["RTE.tsv"], ENTAILMENT),
    "wnli": (["WNLI.tsv"], BINARY),
}
SUPER_GLUE = {
    "boolq": ("BoolQ.jsonl", ("false", "true")),
    "cb": ("CB.jsonl", NLI),
    "copa": ("COPA.jsonl", (0, 1)),
    "multirc": ("MultiRC.jsonl", (0, 1)),
    "record": ("ReCoRD.jsonl", None),
    "rte": ("RTE.jsonl", ENTAILMENT),
    "wic": ("WiC.jsonl", ("false", "true")),
    "wsc": ("WSC.jsonl", ("False", "True")),
}
Command = Callable[..., tuple[int, str, str]]


def verb(command: Command, name: str, path: Path, *more: str) -> tuple[str, str]:
    """Standard output and error of a verb that must succeed, on the newest checkpoint."""
    checkpoint = [] if name == "fit" else ["--ckpt_path", "auto"]
    code, out, err = command(name, "--config", str(path), *checkpoint, *more)
    assert code == 0, err
    return out, err


def evaluation(run: Path) -> dict[str, float]:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return results["evaluations"]["test"]["metrics"]


def assert_trained_on_hidden_test_labels(command: Command, path: Path, run: Path, n_rows: int) -> None:
    out, _ = verb(command, "fit", path)
    assert "val/score" in out
    _, err = verb(command, "test", path)
    assert f"the labels of all {n_rows} rows are hidden, so there is no score; `predict` writes" in err
    assert evaluation(run) == {"test/hidden_labels": n_rows}
    out, _ = verb(command, "predict", path)
    assert "submission: " in out


def check_glue(path: Path, labels: tuple[str, ...] | None, n_rows: int) -> None:
    """A file as GLUE takes it: a header, then each index from 0 with its label or its value."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    assert header == "index\tprediction"
    indices, predictions = zip(*(line.split("\t") for line in lines), strict=True)
    assert [int(index) for index in indices] == list(range(n_rows))
    for prediction in predictions:
        assert prediction in labels if labels else 0 <= float(prediction) <= 5


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", GLUE)
def test_glue_task(task, tiny_classifier, command, tmp_path):
    names, labels = GLUE[task]
    path, run = tiny_classifier("glue", task), tmp_path / "runs" / task
    assert_trained_on_hidden_test_labels(command, path, run, n_rows=len(names) * ON_TEST)
    assert sorted(file.name for file in (run / "submission").iterdir()) == names
    for name in names:
        check_glue(run / "submission" / name, labels, ON_TEST)


@pytest.mark.parametrize("task", SUPER_GLUE)
def test_superglue_task(task, tiny_classifier, command, tmp_path):
    name, labels = SUPER_GLUE[task]
    path, run = tiny_classifier("super_glue", task), tmp_path / "runs" / task
    assert_trained_on_hidden_test_labels(command, path, run, n_rows=ON_TEST)
    (file,) = (run / "submission").iterdir()
    assert file.name == name
    lines = jsonl(file)
    if task == "multirc":
        answers = [a for line in lines for question in line["passage"]["questions"] for a in question["answers"]]
        assert [line["idx"] for line in lines] == [40]
        assert [question["idx"] for question in lines[0]["passage"]["questions"]] == [70, 71]
        lines, first = answers, 100
    else:
        first = 900 if task == "record" else 0
    assert [line["idx"] for line in lines] == list(range(first, first + ON_TEST))
    for line in lines:
        assert set(line) == {"idx", "label"}
        assert line["label"] in labels if labels else isinstance(line["label"], str)


def test_the_diagnostics_of_glue_are_for_a_model_of_mnli(tiny_classifier, command, tmp_path):
    verb(command, "fit", tiny_classifier("glue", "mnli"))
    run = tmp_path / "runs/mnli"
    # no tokenizer named: it is the run's
    path = tiny_classifier("glue", "ax", data={"tokenizer": None})
    for name in ("test", "predict"):
        verb(command, name, path, "--name", "mnli")
    assert evaluation(run) == {"test/hidden_labels": ON_TEST}
    check_glue(run / "submission/AX.tsv", NLI, ON_TEST)


def test_the_diagnostics_of_superglue_are_for_a_model_of_rte(tiny_classifier, command, tmp_path):
    verb(command, "fit", tiny_classifier("super_glue", "rte"))
    run = tmp_path / "runs/rte"
    for task, file, size in (("axb", "AX-b.jsonl", ON_TEST), ("axg", "AX-g.jsonl", DIAGNOSTIC)):
        path = tiny_classifier("super_glue", task, data={"tokenizer": None})
        for name in ("test", "predict"):
            verb(command, name, path, "--name", "rte")
        lines = jsonl(run / "submission" / file)
        assert [line["idx"] for line in lines] == list(range(size))
        assert {line["label"] for line in lines} <= set(ENTAILMENT)
    # AX-g's labels are given
    scores = evaluation(run)
    assert {"test/accuracy", "test/gender_parity", "test/score", "test/loss"} == set(scores)
    assert scores["test/score"] == pytest.approx((scores["test/accuracy"] + scores["test/gender_parity"]) / 2)


REAL = [
    pytest.param(benchmark, task, id=f"{benchmark}-{task}")
    for benchmark, tasks in (("glue", GLUE), ("super_glue", SUPER_GLUE))
    for task in tasks
]


@pytest.mark.real_data
@pytest.mark.parametrize(("benchmark", "task"), REAL)
def test_a_real_slice_is_trained_on_and_scored_on_its_validation_split(
    benchmark, task, real_data, tiny_classifier, command, tmp_path
):
    if not (real_data / benchmark / task).is_dir():
        pytest.skip(f"{real_data} has no {benchmark}/{task}")
    path = tiny_classifier(
        benchmark,
        task,
        net={"max_length": 256},
        data={
            "path": str(real_data / benchmark),
            "tokenizer_size": 1000,
            "max_length": 256,
            "splits": {"test": "validation_matched" if task == "mnli" else "validation"},
            "eval_batch_size": 32,
            "cache_dir": str(tmp_path / "prepared"),
        },
        trainer={"limit_val_batches": 2},
    )
    verb(command, "fit", path)
    verb(command, "test", path)
    run = tmp_path / "runs" / task
    scores = evaluation(run)
    assert "test/hidden_labels" not in scores
    assert 0 < scores["test/loss"] < 20
    verb(command, "predict", path)
    rows = jsonl(run / "predictions.jsonl")
    assert [row["row"] for row in rows] == list(range(len(rows)))
    assert all(row.get("answers") if task == "record" else "label" in row for row in rows)
    assert list((run / "submission").iterdir())
