"""One process and two train, evaluate and predict the same, and a run may go on with another number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conftest import logged, masked_tokens
from mhe_lightning.checkpoint import newest_checkpoint, read_checkpoint
from mhe_lightning.cli import main
from mhe_lightning.data import LanguageModelingData
from mhe_lightning.data.corpus import CorpusSpec
from processes import run

pytestmark = pytest.mark.distributed
ON_TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def numbers(run: Path, column: str, last: int = 12) -> dict[int, float]:
    """A column of a run's metrics.csv by step, up to step ``last``."""
    return {step: float(value) for step, value in logged(run, column).items() if step <= last}


def rows_of(path: Path, split: str) -> int:
    """Rows of a split under the config at ``path``."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["init_args"]
    data = LanguageModelingData(**{**settings, "corpus": CorpusSpec(**settings["corpus"])}, seed=0)
    data.prepare()
    return len(data.dataset(split))


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_two_processes_do_what_one_does(
    tiny_config: Callable[..., Path],
    prose: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    path = tiny_config(
        net={
            "dropout": 0.0,
            "attention": {"class_path": "mhe_lightning.attention.MHE", "init_args": {"combine": "add", "dropout": 0.0}},
        },
        model={"schedule": "constant"},  # so that a run of 6 steps begins as one of 12 does
        data={
            "corpus": {
                "path": str(prose),
                "tokenizer_size": 300,
                "validation_fraction": 0.1,
                "test_fraction": 0.1,
            },
            "batch_size": 48,  # 12 steps go on into a second epoch
            "eval_batch_size": 10,
            "eval_stride": 11,
        },
        trainer={"max_steps": 12, "val_check_interval": 3},
    )
    for split in ("validation", "test"):
        assert rows_of(path, split) % 2 == 1
    assert 6 * 48 < rows_of(path, "train") < 12 * 48
    log = tmp_path / "log"
    one, moved = tmp_path / "runs" / "one", tmp_path / "runs" / "moved"
    fit = ["fit", "--config", str(path), "--name"]

    assert run([*fit, "one"], log=log) == [0], log.read_text()
    two_ranks = run([*fit, "moved", "--trainer.max_steps=6", *ON_TWO], ranks=2, log=log)
    assert two_ranks == [0, 0], log.read_text()

    assert list(numbers(one, "train/loss")) == list(range(1, 13))
    assert list(numbers(one, "val/ppl")) == [3, 6, 9, 12]
    assert numbers(moved, "train/loss") == pytest.approx(numbers(one, "train/loss", last=6), rel=1e-5, abs=0)
    assert numbers(moved, "val/ppl") == pytest.approx(numbers(one, "val/ppl", last=6), rel=1e-6, abs=0)
    for column in ("tokens_seen", "lr"):
        assert numbers(moved, column) == numbers(one, column, last=6)

    # on one process now, over the same rows
    assert run([*fit, "moved", "--ckpt_path", "auto"], log=log) == [0], log.read_text()
    for column in ("train/loss", "val/ppl"):
        assert numbers(moved, column) == pytest.approx(numbers(one, column), rel=1e-5, abs=0)
    assert numbers(moved, "tokens_seen") == numbers(one, "tokens_seen")
    assert_certificate(moved, capsys)

    # and what it predicts
    predict = ["predict", "--config", str(path), "--name", "moved", "--ckpt_path", "auto"]
    assert run([*predict, *ON_TWO], ranks=2, log=log) == [0, 0], log.read_text()
    by_two = predictions(moved)
    (moved / "predictions.jsonl").unlink()
    main(predict)
    by_one = predictions(moved)
    assert [row["row"] for row in by_two] == list(range(rows_of(path, "test")))
    assert [(row["row"], row["tokens"]) for row in by_two] == [(row["row"], row["tokens"]) for row in by_one]
    for key in ("loss", "ppl"):
        assert [row[key] for row in by_two] == pytest.approx([row[key] for row in by_one], rel=1e-5, abs=0)


def assert_certificate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The final checkpoint proves that both parts of the run trained the rows of the seed, each once per epoch."""
    main(["verify-resume", str(folder)])
    assert "576 rows trained in the order of seed 1, none skipped, none repeated" in capsys.readouterr().out
    path = newest_checkpoint(folder / "checkpoints")
    assert path is not None
    checkpoint = read_checkpoint(path)
    assert checkpoint["global_step"] == 12
    segments = checkpoint["LanguageModelingData"]["segments"]
    assert [(s["world_size"], s["start"], s["stop"]) for s in segments] == [(2, 0, 288), (1, 288, 576)]


SETS = [
    pytest.param("glue", "rte", id="classes"),
    pytest.param("glue", "stsb", id="value"),
    pytest.param("super_glue", "copa", id="choice"),
    pytest.param("glue", "mnli", id="parts"),
]


@pytest.mark.parametrize(("benchmark", "task"), SETS)
def test_two_processes_score_labelled_examples_as_one_does(benchmark, task, tiny_classifier, tmp_path):
    split = "validation_matched+validation_mismatched" if task == "mnli" else "validation"
    # with BERT's small numbers a net so narrow gives all examples nearly the same value, and rounding would correlate
    net, data = {"init_std": 0.5}, {"eval_batch_size": 4, "splits": {"test": split}}
    path = str(tiny_classifier(benchmark, task, net=net, data=data))
    folder, log = tmp_path / "runs" / task, tmp_path / "log"
    assert run(["fit", "--config", path], log=log) == [0], log.read_text()

    found = []
    for ranks, options in ((1, []), (2, ON_TWO)):
        for verb in ("validate", "predict"):
            codes = run([verb, "--config", path, "--ckpt_path", "auto", *options], ranks=ranks, log=log)
            assert codes == [0] * ranks, log.read_text()
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        found.append((results["evaluations"]["validate"]["metrics"], predictions(folder)))
        (folder / "predictions.jsonl").unlink()

    (one, by_one), (two, by_two) = found
    assert [row["row"] for row in by_two] == list(range(14 if task == "mnli" else 7))
    assert ("val/mismatched/accuracy" in one) == (task == "mnli")
    assert set(one) == set(two)
    for name, value in one.items():
        discrete = task != "stsb" and name != "val/loss"
        assert two[name] == (value if discrete else pytest.approx(value, rel=1e-6, abs=1e-6))
    numbers = {"scores"} | ({"prediction"} if task == "stsb" else set())
    for a, b in zip(by_one, by_two, strict=True):
        assert {k: v for k, v in a.items() if k not in numbers} == {k: v for k, v in b.items() if k not in numbers}
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)


def test_two_processes_train_and_score_masked_tokens_as_one_does(tiny_config, prose, prepared, tmp_path):
    path = masked_tokens(tiny_config, prose)
    log = tmp_path / "log"

    for name, more, ranks in (("one", [], 1), ("two", ON_TWO, 2)):
        for verb in ("fit", "predict"):
            checkpoint = ["--ckpt_path", "auto"] if verb == "predict" else []
            command = [verb, "--config", str(path), "--name", name, *checkpoint, *more]
            assert run(command, ranks=ranks, log=log) == [0] * ranks, log.read_text()

    one, two = tmp_path / "runs/one", tmp_path / "runs/two"
    for column in ("train/loss", "val/loss", "val/pseudo_ppl"):
        assert numbers(two, column) == pytest.approx(numbers(one, column), rel=1e-5)
    assert numbers(two, "val/accuracy") == numbers(one, "val/accuracy")
    assert [row["row"] for row in predictions(one)] == [row["row"] for row in predictions(two)]
    assert len(predictions(one)) % 2 == 1, "the ranks' shares must differ"
    for own, other in zip(predictions(one), predictions(two), strict=True):
        assert other == pytest.approx(own, rel=1e-4)
