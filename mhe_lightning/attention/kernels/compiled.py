"""C sources of this folder, compiled where they run.

A source is compiled by the machine's own ``gcc`` for its own processor when it is first needed (two to three seconds),
and kept under ``$XDG_CACHE_HOME/mhe_lightning`` (``~/.cache/mhe_lightning``) by source, compiler and processor. Where
that folder cannot be written to, every process compiles for itself. Without Linux and gcc, or with
``MHE_LIGHTNING_COMPILE=0`` in the environment, there is nothing to load, and callers go on with plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")

log = logging.getLogger(__name__)


@functools.cache
def load(source: str) -> ctypes.CDLL | None:
    """The library of a C source in this folder, such as "shared_scores_cpu.c"; None where it cannot be had.

    Its OpenMP is torch's own, whose library torch has loaded by then: threads are those that torch computes with.
    """
    gcc = shutil.which("gcc")
    if os.environ.get("MHE_LIGHTNING_COMPILE") == "0" or sys.platform != "linux" or gcc is None:
        return None
    path = Path(__file__).with_name(source)
    try:
        return _load(path, gcc)
    except (OSError, subprocess.SubprocessError) as error:
        message = getattr(error, "stderr", None) or error
        log.warning("%s could not be compiled, plain torch takes its place: %s", source, str(message).strip())
        return None


def _load(path: Path, gcc: str) -> ctypes.CDLL:
    compiler = subprocess.run([gcc, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    parts = (path.read_text(encoding="utf-8"), compiler, *FLAGS, platform.machine(), _processor())
    name = f"{path.stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhe_lightning"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept = folder / name
        # a library is code: only one's own is loaded
        if not kept.is_file() or kept.stat().st_uid != os.getuid():
            with tempfile.TemporaryDirectory(dir=folder) as own:
                _compile(gcc, path, Path(own) / name).replace(kept)
        return ctypes.CDLL(str(kept))
    except OSError as error:
        log.info("%s cannot be kept in %s: %s", name, folder, error)
    with tempfile.TemporaryDirectory() as own:
        return ctypes.CDLL(str(_compile(gcc, path, Path(own) / name)))  # stays loaded when its file is gone


def _compile(gcc: str, source: Path, library: Path) -> Path:
    subprocess.run(
        [gcc, *FLAGS, "-o", str(library), str(source)], capture_output=True, text=True, check=True, timeout=300
    )
    return library


def _processor() -> str:
    """What the processor can do: the flags that ``-march=native`` goes by."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
