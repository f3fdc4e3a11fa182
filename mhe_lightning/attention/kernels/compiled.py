"""C sources of this folder, compiled where they run.

A source is compiled by the machine's own ``gcc`` for its own processor when it is first needed (two to three seconds),
and kept under ``$XDG_CACHE_HOME/mhe_lightning`` (``~/.cache/mhe_lightning``) by source, compiler and processor. Where
that folder is no good, every process compiles for itself. Without Linux and gcc, or with ``MHE_LIGHTNING_COMPILE=0`` in
the environment, there is nothing to load, and callers go on with plain torch.
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

    Its OpenMP is that of gcc, which PyTorch's own builds for Linux bring along and have loaded by then: the threads are
    those that torch computes with.
    """
    gcc = shutil.which("gcc")
    if os.environ.get("MHE_LIGHTNING_COMPILE") == "0" or sys.platform != "linux" or gcc is None:
        return None
    path = Path(__file__).with_name(source)
    try:
        try:
            return _kept(path, gcc)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # no home, no room, no right to run code
            log.info("what is compiled of %s cannot be kept: %s", source, error)
        with tempfile.TemporaryDirectory() as own:
            return ctypes.CDLL(str(_compile(gcc, path, Path(own) / "own.so")))  # stays loaded when its file is gone
    except (OSError, subprocess.SubprocessError) as error:
        message = getattr(error, "stderr", None) or error
        log.warning("%s could not be compiled, plain torch takes its place: %s", source, str(message).strip())
        return None


def _kept(source: Path, gcc: str) -> ctypes.CDLL:
    """The library in the user's cache, put there if it is not there yet or cannot be loaded.

    Raises:
        OSError: the folder is not to be written to, or not only by this user; the processor is unknown.
        RuntimeError: there is no home.
    """
    parts = (source.read_text(encoding="utf-8"), _run(gcc, "--version"), *FLAGS, platform.machine(), _processor())
    name = f"{source.stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhe_lightning"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:  # a library is code
        raise OSError(f"others may write to {folder}")
    kept = folder / name
    if kept.is_file():
        try:
            return ctypes.CDLL(str(kept))
        except OSError as error:
            log.info("%s is made again: %s", kept, error)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        _compile(gcc, source, Path(own) / name).replace(kept)
    return ctypes.CDLL(str(kept))


def _compile(gcc: str, source: Path, library: Path) -> Path:
    _run(gcc, *FLAGS, "-o", str(library), str(source))
    return library


def _run(*command: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
        check=True,
        timeout=300,
    )
    return done.stdout


def _processor() -> str:
    """What the processor can do, which ``-march=native`` goes by.

    Raises:
        OSError: the system does not tell.
    """
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.lower().startswith(("flags", "features")):
            return line
    raise OSError("/proc/cpuinfo does not tell what the processor can do")
