"""Imports point inward only: config → data → task → model → attention."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mhe_lightning"

ALLOWED = {
    "attention": {"attention"},
    "models": {"models", "attention"},
    "accounting": {"models", "attention"},
    "deferred": set(),
    "distributed": {"attention", "deferred"},
    "communication": {"attention", "models", "distributed"},
    "scaling": {"communication"},
    "extras": set(),
    "errors": set(),
    "files": {"errors"},
    "metrics": {"metrics", "extras"},
    "sharded_checkpoint": {"files"},
    "checkpoint": {"files", "sharded_checkpoint"},
    "strategies": {"checkpoint", "distributed", "sharded_checkpoint"},
    "run": {"checkpoint"},
    "data": {"data", "files"},
    "parsing": {"errors"},
    "nets": {"checkpoint", "parsing"},
    "tasks": {"tasks", "models", "metrics", "deferred", "distributed", "checkpoint", "nets"},
    "pretrained": {"checkpoint", "run"},
    "averaging": {"checkpoint", "run", "pretrained"},
    "callbacks": {
        "callbacks",
        "data",
        "models",
        "accounting",
        "averaging",
        "checkpoint",
        "distributed",
        "errors",
        "run",
        "signals",
        "strategies",
        "files",
    },
}
"""Which rooms of the package a room may import; rooms that are not named may import all."""


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full names"
            names = [node.module or ""]
            if node.module == "mhe_lightning":
                names = [f"mhe_lightning.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("mhe_lightning.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_the_rooms_further_in(room):
    files = list((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    for path in files:
        assert imported_rooms(path) <= ALLOWED[room], path


def test_only_the_command_line_imports_the_verbs():
    outside = [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE / "verbs" and p != PACKAGE / "cli.py"]
    assert len(outside) > 50
    for path in outside:
        assert "verbs" not in imported_rooms(path), path


def test_attention_imports_nothing_but_torch_and_the_standard_library():
    third_party = {"lightning", "numpy", "datasets", "tokenizers", "torchmetrics", "yaml", "jsonargparse", "triton"}
    for path in (PACKAGE / "attention").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found = {n.split(".")[0] for node in ast.walk(ast.parse(text)) for n in _imported(node)}
        # kernels are in files of their own, which are imported where they can run
        assert not found & (third_party - ({"triton"} if "_triton" in path.stem else set())), path


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []
