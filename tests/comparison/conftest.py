"""Runs to compare: one small training, and copies of it that are edited to be of other attentions and seeds."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from mhe_lightning.cli import main
from mhe_lightning.comparison import compare as comparing
from mhe_lightning.experiment import Experiments

NOT_NEEDED = ("checkpoints", "tensorboard", "tokenizer.json", ".lock")
REMOVED = object()
"""Edits a key away."""


class Copies:
    """Folders of runs in ``root``, made from one that was trained."""

    def __init__(self, trained: Path, root: Path) -> None:
        self.trained = trained
        self.root = root

    def __call__(
        self,
        attention: str = "mha",
        seed: int = 1,
        *,
        name: str | None = None,
        root: Path | None = None,
        val: float = 10.0,
        test: float | None = None,
        config: Mapping[str, Any] | None = None,
        results: Mapping[str, Any] | None = None,
        whole: bool = False,
    ) -> Path:
        """A run of an overlay of configs/attention; ``config`` and ``results`` have dotted keys → other values.

        With checkpoints if it is ``whole``. Without ``test``, it was not tested.
        """
        folder = (root or self.root) / (name or f"{attention}-seed{seed}")
        shutil.copytree(self.trained, folder, ignore=None if whole else shutil.ignore_patterns(*NOT_NEEDED))
        overlay = yaml.safe_load((ROOT / f"configs/attention/{attention}.yaml").read_text(encoding="utf-8"))
        overlay["init_args"] = {"dropout": 0.0, "bias": True, **overlay.get("init_args", {})}
        edited = {"seed_everything": seed, "name": folder.name, "model.init_args.net.init_args.attention": overlay}
        edit(folder / "config.yaml", {**edited, **(config or {})})
        if test is None:
            evaluation = {"evaluations.test": REMOVED}
        else:
            data = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]
            evaluation = {"evaluations.test.metrics": {"test/ppl": test}, "evaluations.test.data": data}
        edit(
            folder / "results.json",
            {"seed": seed, "git_commit": "abc", "metrics.val/ppl": val, **evaluation, **(results or {})},
        )
        return folder

    def sweep(
        self,
        runs: Sequence[Path],
        *,
        mode: str = "equal_architecture",
        sizes: Mapping[str, Mapping[str, int]] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        grid: Mapping[str, Sequence[str]] | None = None,
        chosen: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Path:
        """The root of a sweep of ``runs``, whose names begin with their attention; ``sizes`` are by attention."""
        entries = {}
        for run in runs:
            attention = run.name.partition("-")[0]
            own = {"settings": (settings or {}).get(run.name, {}), "sizes": (sizes or {}).get(attention, {})}
            entries[run.name] = {"attention": attention, "seed": int(run.name.rpartition("seed")[2]), **own}
        manifest = {"format_version": 1, "mode": mode, "grid": grid or {}, "chosen": chosen or {}}
        root = runs[0].parent
        root.mkdir(parents=True, exist_ok=True)
        (root / "sweep.json").write_text(json.dumps({**manifest, "runs": entries}), encoding="utf-8")
        return root


def edit(path: Path, changes: Mapping[str, Any]) -> None:
    """Put values into a JSON or YAML file by their dotted keys."""
    text = path.read_text(encoding="utf-8")
    content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    for key, value in changes.items():
        *places, last = key.split(".")
        place = content
        for name in places:
            place = place.setdefault(name, {})
        if value is REMOVED:
            place.pop(last, None)
        else:
            place[last] = value
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture(scope="session")
def experiments() -> Experiments:
    return Experiments()


@pytest.fixture(scope="session")
def trained(prose: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder's run of a few steps, tested."""
    root = tmp_path_factory.mktemp("trained")
    net = {"width": 16, "n_heads": 2, "n_layers": 2, "max_length": 16, "dropout": 0.0}
    attention = {"class_path": "mhe_lightning.attention.MHE", "init_args": {"combine": "add"}}
    net = {"class_path": "mhe_lightning.models.Decoder", "init_args": {**net, "attention": attention}}
    corpus = {"path": str(prose), "tokenizer_size": 300, "validation_fraction": 0.1, "test_fraction": 0.1}
    data = {"corpus": corpus, "block_length": 16, "batch_size": 8, "cache_dir": str(prepared)}
    config = {
        "name": "tiny",
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 8,
            "log_every_n_steps": 1,
            "val_check_interval": 4,
            "default_root_dir": str(root),
            "enable_model_summary": False,
        },
        "model": {
            "class_path": "mhe_lightning.tasks.LanguageModeling",
            "init_args": {"lr": 1e-2, "warmup_steps": 2, "net": net},
        },
        "data": {"class_path": "mhe_lightning.data.LanguageModelingData", "init_args": data},
        "checkpoints": {"every_n_steps": 8},
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py"])
        main(["fit", "--config", str(path)])
        main(["test", "--config", str(path), "--ckpt_path", "auto"])
    return root / "tiny"


@pytest.fixture(scope="session")
def copies_in(trained: Path) -> Callable[[Path], Copies]:
    return lambda root: Copies(trained, root)


@pytest.fixture
def copies(copies_in: Callable[[Path], Copies], tmp_path: Path) -> Copies:
    return copies_in(tmp_path / "runs")


@pytest.fixture
def compare(
    command: Callable[..., tuple[int, str, str]], experiments: Experiments, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """`compare` with these arguments: exit code, standard output and standard error."""
    monkeypatch.setattr(comparing, "Experiments", lambda: experiments)  # made once for all tests
    return lambda *arguments: command("compare", *map(str, arguments))


@pytest.fixture
def models_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are not built to count their parameters, which takes the most time."""
    monkeypatch.setattr(comparing._Costs, "of", lambda run, experiments: comparing._Costs(640, 1000, 64, 4, 16, False))
