"""SQuAD through the command line: trained, tested, and written as the official script reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from data.test_squad import NONE, TRAIN, VALIDATION, write
from processes import run


@pytest.fixture
def config(tiny_classifier, tmp_path):
    """Writes the config of an encoder that is trained on SQuAD in miniature."""

    def make(version: str, **data) -> Path:
        path = tiny_classifier("glue", "cola", net={"max_length": 192})
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        spec["name"] = "squad"
        spec["model"]["class_path"] = "mhe_lightning.tasks.ExtractiveQuestionAnswering"
        rows = [NONE] if version == "v2" else []
        options = {
            "version": version,
            "path": str(write(tmp_path / "squad", TRAIN + rows, VALIDATION + rows)),
            "tokenizer": "wordpiece",
            "tokenizer_size": 300,
            "max_length": 32,
            "stride": 8,
            "max_question_length": 8,
            "batch_size": 4,
            "cache_dir": str(tmp_path / "prepared"),
            **data,
        }
        spec["data"] = {"class_path": "mhe_lightning.data.SquadData", "init_args": options}
        path.write_text(yaml.safe_dump(spec), encoding="utf-8")
        return path

    return make


def verbs(command, path: Path, *names: str) -> None:
    for name in names:
        checkpoint = [] if name == "fit" else ["--ckpt_path", "auto"]
        code, _, err = command(name, "--config", str(path), *checkpoint)
        assert code == 0, err


def check_files(folder: Path, ids: list[str], version: str) -> None:
    """What the official script reads: a text for every question and, in version 2.0, a number."""
    submission = folder / "submission"
    names = ["predictions.json"] if version == "v1" else ["null_odds.json", "predictions.json"]
    assert sorted(file.name for file in submission.iterdir()) == names
    texts = json.loads((submission / "predictions.json").read_text(encoding="utf-8"))
    assert sorted(texts) == sorted(ids)
    assert all(isinstance(text, str) for text in texts.values())
    if version == "v2":
        odds = json.loads((submission / "null_odds.json").read_text(encoding="utf-8"))
        assert sorted(odds) == sorted(ids)
        assert all(isinstance(number, float) for number in odds.values())
    else:
        assert all(texts.values())


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["evaluations"]["test"]["metrics"]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_invented_questions(version, config, command, tmp_path):
    verbs(command, config(version), "fit", "test", "predict")

    folder = tmp_path / "runs/squad"
    assert {"test/exact", "test/f1", "test/loss", "test/score"} <= set(metrics(folder))
    assert ("test/best_f1_threshold" in metrics(folder)) == (version == "v2")
    check_files(folder, ["v", "w", "n"][: 2 if version == "v1" else 3], version)


@pytest.mark.distributed
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_two_ranks_score_and_predict_as_one(version, config, command, tmp_path):
    path, folder, log = config(version), tmp_path / "runs/squad", tmp_path / "log"
    verbs(command, path, "fit", "test", "predict")
    alone, predictions = metrics(folder), (folder / "predictions.jsonl").read_text(encoding="utf-8")
    (folder / "predictions.jsonl").unlink()

    on_two = ["--config", str(path), "--ckpt_path", "auto", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    for name in ("test", "predict"):
        assert run([name, *on_two], ranks=2, log=log) == [0, 0], log.read_text()

    together = metrics(folder)
    assert set(together) == set(alone)
    for name, value in alone.items():
        if name.endswith(("loss", "threshold")):
            assert together[name] == pytest.approx(value, rel=1e-5, abs=1e-5)
        else:
            assert together[name] == value
    for one, other in zip(
        predictions.splitlines(), (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines(), strict=True
    ):
        assert json.loads(one)["id"] == json.loads(other)["id"]
        assert json.loads(one)["prediction_text"] == json.loads(other)["prediction_text"]


@pytest.mark.real_data
@pytest.mark.parametrize(("version", "name"), [("v1", "squad"), ("v2", "squad_v2")])
def test_a_real_slice(version, name, real_data, config, command, tmp_path):
    if not (real_data / name).is_dir():
        pytest.skip(f"{real_data} has no {name}")
    small = {"max_length": 192, "stride": 140, "max_question_length": 20, "eval_batch_size": 32, "tokenizer_size": 1000}
    verbs(command, config(version, path=str(real_data / name), **small), "fit", "test", "predict")

    folder = tmp_path / "runs/squad"
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    check_files(folder, [line["id"] for line in lines], version)
    assert 0 <= metrics(folder)["test/exact"] <= metrics(folder)["test/f1"] <= 100
