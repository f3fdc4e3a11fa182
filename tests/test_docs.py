"""What README and docs tell people to type does what they say."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mhe_lightning.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^(<!-- not run: [^>]+ -->\n)?```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.M | re.S)

LINK = re.compile(r"\]\(([^)#]+)\)")

SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "2"]
"""Appended to each `fit`: what is tested is the command, not the result."""

INSTALLING = ("pip install", "pytest", "git clone", "cd ", "python -m venv", ". .venv", "bash .ci/run", "pre-commit")
"""Lines that CI itself goes through, or that come before there is anything to run."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in that looks like a clone, shared by the pages so that corpora are packed once."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_code_run(page, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    for skipped, language, file, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if skipped:
            continue
        if file:
            Path(file).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, str(page), "exec"), {})
        elif language == "bash":
            run_block(text, monkeypatch)


def run_block(text: str, monkeypatch) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        command = line.split("  #")[0].strip()
        if not command or command.startswith(INSTALLING):
            continue
        if command.startswith("torchrun "):
            subprocess.run(["bash", "-c", shlex.join([*shlex.split(command), *SHORT])], check=True)
            continue
        before, found, after = command.partition("python train.py ")
        if not found:
            subprocess.run(["bash", "-c", command], check=True)
            continue
        stdin = ""
        if before:
            assert before.rstrip().endswith("|")
            stdin = subprocess.run(
                ["bash", "-c", before.rstrip(" |")], check=True, capture_output=True, text=True
            ).stdout
        args = shlex.split(after)
        if args[0] == "fit" and "--print_config" not in args and not any("help" in arg for arg in args):
            args += SHORT
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(sys, "argv", ["train.py"])
        assert exit_code(args) == 0, command


def exit_code(args: list[str]) -> int | str:
    try:
        main(args)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_every_page_is_reached_from_the_readme():
    reached, found = set(), {ROOT / "README.md"}
    while found:
        page = found.pop()
        reached.add(page)
        links = {(page.parent / target).resolve() for target in LINK.findall(page.read_text(encoding="utf-8"))}
        found |= {link for link in links if link.suffix == ".md" and link.exists()} - reached
    for page in PAGES:
        assert page in reached, page


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"
                assert os.path.commonpath([ROOT, (page.parent / target).resolve()]) == str(ROOT)
