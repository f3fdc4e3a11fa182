"""The averages of GLUE and SuperGLUE are those of the benchmarks."""

from __future__ import annotations

import json

import pytest

from mhe_lightning.benchmarks import benchmark_average
from mhe_lightning.cli import main

# Devlin et al. 2019, table 1, and the leaderboard's entry of the same model for WNLI and the average
BERT_BASE = {
    "cola": [52.1],
    "sst2": [93.5],
    "mrpc": [88.9, 84.8],
    "stsb": [87.1, 85.8],
    "qqp": [71.2, 89.2],
    "mnli": [84.6, 83.4],
    "qnli": [90.5],
    "rte": [66.4],
    "wnli": [65.1],
}
# Wang et al. 2019, table 3, BERT
SUPERGLUE_BERT = {
    "boolq": [77.4],
    "cb": [75.7, 83.6],
    "copa": [70.6],
    "multirc": [70.0, 24.0],
    "record": [72.0, 71.3],
    "rte": [71.6],
    "wic": [69.5],
    "wsc": [64.3],
}


@pytest.mark.parametrize(
    ("benchmark", "metrics", "average"), [("glue", BERT_BASE, 78.3), ("superglue", SUPERGLUE_BERT, 69.0)]
)
def test_published_scores_give_the_published_average(benchmark, metrics, average):
    scores = {task: sum(values) / len(values) for task, values in metrics.items()}

    assert round(benchmark_average(benchmark, scores), 1) == average


def a_run(folder, label, **results):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"data": {"label": label}, **results}))
    return str(folder)


def test_an_incomplete_benchmark_has_no_average_but_a_list_of_what_is_missing(tmp_path, capsys):
    run = a_run(tmp_path / "a", "glue-cola", metrics={"val/score": 0.5, "val/matthews": 0.5, "val/loss": 1.0})

    main(["average", run])

    out = capsys.readouterr().out
    assert "cola       50.0   matthews 50.0" in out
    assert "no average of glue: sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli missing" in out


def test_a_later_evaluation_counts_instead_of_the_end_of_training(tmp_path, capsys):
    evaluations = {"validate": {"metrics": {"val/score": 0.75, "val/accuracy": 0.75}}}
    metrics = {"val/score": 0.5, "val/accuracy": 0.5}

    main(["average", a_run(tmp_path / "a", "superglue-wic", metrics=metrics, evaluations=evaluations)])

    assert "wic        75.0   accuracy 75.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["glue-cola", "superglue-wic"], "glue and superglue, which have an average each"),
        (["glue-cola", "glue-cola"], "a second run of cola"),
        (["squad-v1"], "not a run of GLUE or SuperGLUE"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(labels, message, tmp_path, capsys):
    runs = [a_run(tmp_path / str(i), label, metrics={"val/score": 0.5}) for i, label in enumerate(labels)]

    with pytest.raises(SystemExit) as stop:
        main(["average", *runs])

    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_scores_of_diagnostics_are_not_taken_for_those_of_the_task(tmp_path, capsys):
    evaluations = {"test": {"metrics": {"test/score": 0.1}, "data": {"init_args": {"task": "axb"}}}}
    run = a_run(tmp_path / "a", "superglue-rte", metrics={}, evaluations=evaluations)

    with pytest.raises(SystemExit) as stop:
        main(["average", run, "--split", "test"])

    assert stop.value.code == 2
    assert "was on axb; run `test` on rte again" in capsys.readouterr().err


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["average", str(tmp_path)])

    assert stop.value.code == 2
    assert "is not a finished run" in capsys.readouterr().err
