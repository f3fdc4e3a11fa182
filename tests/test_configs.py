"""Every YAML that we ship builds what it describes. A new file needs no new test."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from tokenizers import Tokenizer
from tokenizers.models import BPE

from mhe_lightning.data import TranslationData
from mhe_lightning.data.examples import ExampleData
from mhe_lightning.data.language_modeling import CorpusData
from mhe_lightning.parsing import Parser
from mhe_lightning.tasks import Task
from mhe_lightning.verbs.train import TrainCLI

CONFIGS = Path(__file__).parents[1] / "configs"


def configs(*folders: str) -> list:
    paths = sorted(path for folder in folders for path in (CONFIGS / folder).glob("*.yaml"))
    return [pytest.param(path, id=str(path.relative_to(CONFIGS))) for path in paths]


class BuildOnly(TrainCLI):
    """Builds the data module, the task and the trainer of a config, without data and without running them."""

    def _prepare_data(self, options):
        pass

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture
def without_data(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    vocab_size = property(lambda self: self.spec.tokenizer_size)
    monkeypatch.setattr(CorpusData, "vocab_size", vocab_size)
    monkeypatch.setattr(ExampleData, "vocab_size", property(lambda self: self.tokenizer_size))
    for data in (CorpusData, ExampleData):
        monkeypatch.setattr(data, "tokenizer", property(lambda self: Tokenizer(BPE())))
    monkeypatch.setattr(TranslationData, "end_token", 0)


@pytest.mark.parametrize("path", configs(".", "experiment"))
def test_experiment_builds(path, without_data):
    with torch.device("meta"):
        cli = BuildOnly("fit", ["--config", str(path), "--trainer.accelerator", "cpu"], ExitStack())

    assert isinstance(cli.model, Task)
    assert isinstance(cli.trainer, Trainer)
    assert cli.model.net.vocab_size == cli.datamodule.vocab_size
    length = "max_length" if isinstance(cli.datamodule, ExampleData) else "block_length"
    assert 0 < getattr(cli.datamodule, length) <= cli.model.net.max_length
    assert cli.trainer.max_steps > 0
    assert cli._config_text()  # what a run saves


@pytest.mark.parametrize("attention", configs("attention"))
def test_every_attention_overlays_an_experiment(attention, without_data):
    path = CONFIGS / "quickstart.yaml"
    with torch.device("meta"):
        cli = BuildOnly("fit", ["--config", str(path), f"--model.net.attention={attention}"], ExitStack())

    layers = [block.attention for block in cli.model.net.blocks]
    assert len({id(layer) for layer in layers}) == len(layers)
    assert {type(layer).__name__ for layer in layers} == {_class_named_in(attention)}


LINKED = {
    "SequenceClassification": [
        "--piece.problem=classes",
        "--piece.n_labels=2",
        "--piece.n_spans=0",
        "--piece.metrics=[f1]",
    ],
    "ExtractiveQuestionAnswering": ["--piece.unanswerable=true"],
    "Translation": ["--piece.end_token=0"],
}
"""What a run's data say to its task."""


@pytest.mark.parametrize("path", configs("model", "data"))
def test_piece_is_accepted(path, without_data):
    base = LightningModule if path.parent.name == "model" else LightningDataModule
    parser = Parser()
    linked = {"init_args.net.init_args.vocab_size", "tokenizer"} if base is LightningModule else set()
    parser.add_subclass_arguments(base, "piece", skip=linked)
    text = path.read_text(encoding="utf-8")
    extra = ["--piece.seed=0"]
    if base is LightningModule:
        extra = ["--piece.max_steps=1", "--piece.net.vocab_size=8", *LINKED.get(_class_named_in(path), [])]

    parsed = parser.parse_args([f"--piece={path}", *extra])

    assert parsed.piece.class_path in text


@pytest.mark.parametrize("path", configs(".", "experiment", "model", "data"))
def test_hyperparameters_come_with_comments(path):
    assert "#" in path.read_text(encoding="utf-8")


def _class_named_in(path: Path) -> str:
    line = next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("class_path"))
    return line.rsplit(".", 1)[1]
