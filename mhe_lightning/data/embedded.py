"""The corpus that needs no files and no network: Python's own prose."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from mhe_lightning.data.pieces import Piece, require_split, row_pieces
from mhe_lightning.files import sha256

MIN_DOCSTRING_CHARS = 40

# Folders and files of the standard library that are tests, local set-up, or what some distributions of Python
# ship separately or patch: without them the corpus is the same for a Python version wherever it is installed.
_NOT_PROSE = frozenset(
    [
        *("test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "__pycache__", "tkinter"),
        *("turtledemo", "distutils", "ensurepip", "venv", "macholib", "sitecustomize.py", "usercustomize.py"),
    ]
)
_LOCAL_SETUP = re.compile(r"config-|_sysconfigdata|_distutils_system_mod")


class EmbeddedSource:
    """English prose that every Python carries: its help topics and the docstrings of its standard library.

    2 MB of text, no download; the same for a Python version wherever it is installed. One split, `train`.
    """

    name = "embedded"

    def splits(self) -> tuple[str, ...]:
        return ("train",)

    def pieces(self, split: str) -> Iterator[Piece]:
        require_split(self, split)
        return row_pieces(_embedded_documents(), None)

    def identity(self) -> dict[str, Any]:
        return {"embedded_sha256": _embedded_hash()}


def _library_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = ((file.relative_to(root), file) for file in root.rglob("*.py"))
    return sorted(
        (relative.as_posix(), file)
        for relative, file in files
        if not _NOT_PROSE.intersection(relative.parts) and not _LOCAL_SETUP.match(relative.parts[0])
    )


@lru_cache(maxsize=1)
def _embedded_hash() -> str:
    """Over the files that the corpus is read from: parsing them takes seconds, hashing them does not."""
    total = hashlib.sha256()
    for name, file in _library_files():
        total.update(f"{name}\0{sha256(file)}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=1)
def _embedded_documents() -> tuple[str, ...]:
    from pydoc_data.topics import topics  # half a megabyte that nothing else needs

    documents = [topics[name] for name in sorted(topics)]
    for _, file in _library_files():
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # deliberately broken files, and encodings that do not decode
            continue
        documents += [docstring for docstring in _docstrings(tree) if len(docstring) >= MIN_DOCSTRING_CHARS]
    return tuple(documents)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, class or function and of all within, in the order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    # Down through statements only: a walk over all expressions takes as long as parsing does.
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            yield from _docstrings(child)
