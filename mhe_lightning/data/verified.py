"""Checksums of prepared data, which are long to compute and are computed once for as long as a file stays untouched."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from mhe_lightning.files import sha256, write_text

STAMP = "verified.json"
"""Beside the files: of each that was found whole its SHA-256, its size and when it was last changed."""


def damaged_file(folder: Path, checksums: Mapping[str, str], *, again: bool = False) -> str | None:
    """The name of the first file whose content is not what its checksum says, or None if all are whole.

    A file is read anew only if its size or its time of change (ctime, which no program can set) differs from when it
    was last found whole: a corpus of 100 GB takes minutes to hash, and every rank of every start would. What this
    cannot see is a medium that changes bits by itself; ``again`` reads everything.

    Args:
        folder: where the files are; the stamp goes there too, where it can be written.
        checksums: file name → SHA-256.
        again: read also what was found whole before, and leave the stamp as it is.
    """
    known = {} if again else _stamps(folder)
    found = {}
    for name, expected in checksums.items():
        status = (folder / name).stat()
        stamp = [expected, status.st_size, status.st_ctime_ns]
        if known.get(name) != stamp and sha256(folder / name) != expected:
            return name
        found[name] = stamp
    if not again and any(known.get(name) != stamp for name, stamp in found.items()):
        with contextlib.suppress(OSError):  # a folder that is read-only, or full, is hashed every time
            write_text(folder / STAMP, json.dumps({**known, **found}))
    return None


def _stamps(folder: Path) -> dict[str, list[str | int]]:
    try:
        stamps = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}
