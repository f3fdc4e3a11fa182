"""Fixtures that every test may use."""

from __future__ import annotations

import csv
import io
import logging
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from mhe_lightning.cli import main
from mhe_lightning.data import CorpusSpec, LanguageModelingData

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork
torch.set_num_threads(1)  # threads that compete for busy cores are many times slower
ROOT = Path(__file__).parents[1]
WORDS = "the a cat dog bird tree river stone light dark sings runs sleeps over under with slowly often".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, or a visible skip."""
    folder = os.environ.get("MHE_TEST_DATA")
    if not folder:
        pytest.skip("MHE_TEST_DATA is not set: no real data sets here")
    return Path(folder)


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 200 invented documents."""
    draw = random.Random(7)
    path = tmp_path_factory.mktemp("prose") / "prose.jsonl"
    lines = []
    for _ in range(200):
        words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(5, 40)))
        lines.append(f'{{"text": "{words}."}}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests' corpora are packed, once for all of them."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Hub's layout with all tasks of GLUE in miniature."""
    from hub_fixtures import write_glue  # imports `datasets`, which costs seconds

    return write_glue(tmp_path_factory.mktemp("hub") / "glue")


@pytest.fixture(scope="session")
def super_glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Hub's layout with all tasks of SuperGLUE in miniature."""
    from hub_fixtures import write_super_glue

    return write_super_glue(tmp_path_factory.mktemp("hub") / "super_glue")


@pytest.fixture(scope="session")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Hub's layout with a parallel corpus in miniature, of "en" and "de"."""
    from hub_fixtures import write_translation

    return write_translation(tmp_path_factory.mktemp("hub") / "parallel")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process; gives exit code, standard output and standard error."""

    def run(*args: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py"])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        for handler in logging.getLogger("lightning.pytorch").handlers:
            if type(handler) is logging.StreamHandler:  # not one of pytest's
                monkeypatch.setattr(handler, "stream", sys.stderr)  # it was that of the import
        code = 0
        try:
            main(list(args))
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def tiny_config(prose: Path, prepared: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the config of a decoder that trains in a second; keywords override its parts."""

    def write(
        *, net: dict | None = None, model: dict | None = None, data: dict | None = None, trainer: dict | None = None
    ) -> Path:
        config = {
            "name": "tiny",
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": 8,
                "log_every_n_steps": 1,
                "val_check_interval": 4,
                "gradient_clip_val": 1.0,
                "default_root_dir": str(tmp_path / "runs"),
                "enable_model_summary": False,
                **(trainer or {}),
            },
            "model": {
                "class_path": "mhe_lightning.tasks.LanguageModeling",
                "init_args": {
                    "lr": 1e-2,
                    "warmup_steps": 2,
                    **(model or {}),
                    "net": {
                        "class_path": "mhe_lightning.models.Decoder",
                        "init_args": {
                            "width": 16,
                            "n_heads": 2,
                            "n_layers": 2,
                            "max_length": 16,
                            "dropout": 0.1,
                            "attention": {
                                "class_path": "mhe_lightning.attention.MHE",
                                "init_args": {"combine": "add", "dropout": 0.1},
                            },
                            **(net or {}),
                        },
                    },
                },
            },
            "data": {
                "class_path": "mhe_lightning.data.LanguageModelingData",
                "init_args": {
                    "corpus": {"path": str(prose), "tokenizer_size": 300, "validation_fraction": 0.1},
                    "block_length": 16,
                    "batch_size": 8,
                    "cache_dir": str(prepared),
                    **(data or {}),
                },
            },
            "checkpoints": {"every_n_steps": 2},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    return write


@pytest.fixture
def tiny_classifier(glue: Path, super_glue: Path, prepared: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the config of an encoder that is trained on a task in miniature; keywords override its parts."""

    def write(
        benchmark: str,
        task: str,
        *,
        net: dict | None = None,
        model: dict | None = None,
        data: dict | None = None,
        trainer: dict | None = None,
    ) -> Path:
        config = {
            "name": task,
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": 2,
                "log_every_n_steps": 1,
                "val_check_interval": 2,
                "default_root_dir": str(tmp_path / "runs"),
                **(trainer or {}),
            },
            "model": {
                "class_path": "mhe_lightning.tasks.SequenceClassification",
                "init_args": {
                    "lr": 1e-2,
                    **(model or {}),
                    "net": {
                        "class_path": "mhe_lightning.models.Encoder",
                        "init_args": {
                            "width": 16,
                            "n_heads": 2,
                            "n_layers": 1,
                            "max_length": 48,
                            "attention": {
                                "class_path": "mhe_lightning.attention.MHE",
                                "init_args": {"combine": "add"},
                            },
                            **(net or {}),
                        },
                    },
                },
            },
            "data": {
                "class_path": f"mhe_lightning.data.{'GlueData' if benchmark == 'glue' else 'SuperGlueData'}",
                "init_args": {
                    "task": task,
                    "path": str(glue if benchmark == "glue" else super_glue),
                    "tokenizer": "wordpiece",
                    "tokenizer_size": 256,
                    "max_length": 48,
                    "batch_size": 4,
                    "cache_dir": str(prepared),
                    **(data or {}),
                },
            },
            "checkpoints": {"monitor": "val/score", "mode": "max"},
        }
        path = tmp_path / f"{task}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    return write


@pytest.fixture
def tiny_translation(parallel: Path, prepared: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the config of an encoder-decoder that learns to translate in miniature; keywords override its parts."""

    def write(
        *, net: dict | None = None, model: dict | None = None, data: dict | None = None, trainer: dict | None = None
    ) -> Path:
        config = {
            "name": "translation",
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": 4,
                "log_every_n_steps": 1,
                "val_check_interval": 2,
                "default_root_dir": str(tmp_path / "runs"),
                **(trainer or {}),
            },
            "model": {
                "class_path": "mhe_lightning.tasks.Translation",
                "init_args": {
                    "lr": 1e-2,
                    "fit_beam_size": 1,
                    "beam_size": 2,
                    "extra_tokens": 5,
                    **(model or {}),
                    "net": {
                        "class_path": "mhe_lightning.models.EncoderDecoder",
                        "init_args": {
                            "width": 16,
                            "n_heads": 2,
                            "n_layers": 1,
                            "max_length": 64,
                            "dropout": 0.1,
                            "attention": {
                                "class_path": "mhe_lightning.attention.MHE",
                                "init_args": {"combine": "add"},
                            },
                            **(net or {}),
                        },
                    },
                },
            },
            "data": {
                "class_path": "mhe_lightning.data.TranslationData",
                "init_args": {
                    "path": str(parallel),
                    "source": "en",
                    "target": "de",
                    "tokenizer": "bpe",
                    "tokenizer_size": 300,
                    "max_length": 40,
                    "batch_tokens": 128,
                    "eval_batch_size": 3,
                    "cache_dir": str(prepared),
                    **(data or {}),
                },
            },
            "checkpoints": {"monitor": "val/score", "mode": "max"},
        }
        path = tmp_path / "translation.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    return write


def masked_tokens(tiny_config: Callable[..., Path], prose: Path) -> Path:
    """The config of an encoder that learns masked tokens for four steps, without dropout; the ranks' shares differ."""
    path = tiny_config(net={"dropout": 0.0}, data={"block_length": 15}, trainer={"max_steps": 4})
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["model"]["class_path"] = "mhe_lightning.tasks.MaskedLanguageModeling"
    config["model"]["init_args"]["net"]["class_path"] = "mhe_lightning.models.Encoder"
    config["model"]["init_args"]["net"]["init_args"]["attention"]["init_args"]["dropout"] = 0.0
    config["data"]["class_path"] = "mhe_lightning.data.MaskedLanguageModelingData"
    config["data"]["init_args"]["corpus"] = {
        "path": str(prose),
        "tokenizer": "wordpiece",
        "tokenizer_size": 300,
        "validation_fraction": 0.1,
        "test_fraction": 0.1,
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def prepare(config: dict) -> None:
    """Pack a config's corpus: a group of processes finds it ready."""
    data = config["data"]["init_args"]
    LanguageModelingData(**{**data, "corpus": CorpusSpec(**data["corpus"]), "seed": 0}).prepare()


def logged(run: Path, column: str) -> dict[int, str]:
    """A column of a run's metrics.csv by step, as written."""
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        return {int(row["step"]): row[column] for row in csv.DictReader(file) if row.get(column)}
