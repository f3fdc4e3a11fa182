"""Other libraries' checkpoints as plain data: config.json and safetensors, never a pickle and never code."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mhe_lightning.extras import require

if TYPE_CHECKING:
    import safetensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")
"""Weights in formats that are not read: most of them run code when they are, the rest no library here reads."""

DTYPES = ("F32", "BF16", "F16")
"""What weights may be stored as; each of their numbers is one of float32."""

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_TIMEOUT_S = 2.0
LFS_POINTER = b"version https://git-lfs"


def locate(source: str, besides: Sequence[str] = ()) -> Path:
    """The folder of a checkpoint: a local one as it is, a Hub name's from the Hub or its cache.

    From the Hub come config.json, safetensors and ``besides``, nothing else.

    Args:
        source: a folder, or a name such as ``openai-community/gpt2``.
        besides: names of further files that are wanted of a model on the Hub, those of its tokenizer.

    Raises:
        ValueError: there is no such folder, and no such model that can be had.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file; give the folder that holds {CONFIG} and {WEIGHTS}")
    if source.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(source):
        raise ValueError(f"{source} does not exist; give a folder with {CONFIG} and {WEIGHTS}, or a model's Hub name")
    from huggingface_hub import snapshot_download  # comes with `datasets`; costs a second
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = [CONFIG, "*.safetensors", "*.safetensors.index.json", *besides]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted, etag_timeout=HUB_TIMEOUT_S))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{source} is no folder here and cannot be had from the Hub ({reason}); download it where there is a "
            "connection and give the folder"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says.

    Raises:
        ValueError: there is none, it is not JSON of one object, or it asks for code of its own or quantised weights.
    """
    config = read_json(folder / CONFIG)
    if "auto_map" in config:
        raise ValueError(
            f"{folder / CONFIG} asks for code of its own (auto_map), which is not run; give a checkpoint of a stock "
            "class of transformers"
        )
    if config.get("quantization_config"):
        raise ValueError(
            f"{folder / CONFIG} says that the weights are quantised (quantization_config); give the checkpoint that "
            "they were made from"
        )
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that its index names, by name, in the dtypes of the file.

    Raises:
        ValueError: there are none, a file is damaged or named by a path, or a dtype is not float32, bfloat16 or
            float16; or safetensors is not installed.
    """
    if (folder / WEIGHTS).is_file():
        with _open(folder / WEIGHTS) as file:
            return _tensors(folder / WEIGHTS, file, file.keys())
    if not (folder / INDEX).is_file():
        raise ValueError(_nothing_to_read(folder))
    by_file: dict[str, list[str]] = {}
    for tensor, name in _weight_map(folder / INDEX).items():
        by_file.setdefault(name, []).append(tensor)
    found: dict[str, Tensor] = {}
    for name, tensors in by_file.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} does not exist, but {INDEX} names it; the checkpoint is incomplete")
        with _open(folder / name) as file:
            missing = sorted(set(tensors) - set(file.keys()))
            if missing:
                raise ValueError(f"{folder / name} has no tensor {missing[0]}, but {INDEX} says so; it is another's")
            found.update(_tensors(folder / name, file, tensors))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if there is none."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a folder that save_pretrained of transformers has written")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); save the checkpoint again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; save the checkpoint again")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → name of its file, which is in the index's own folder."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map; save the checkpoint again with save_pretrained")
    for name in files.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(f"{index} names the file {name!r}; it must be the plain name of a .safetensors beside it")
    return files


def _open(path: Path) -> safetensors.safe_open:
    library = require("safetensors", "hf", f"read {path.name}")
    try:
        return library.safe_open(path, framework="pt", device="cpu")
    except library.SafetensorError as error:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{path} is a pointer of git-lfs, not the weights; run `git lfs pull`") from error
        raise ValueError(f"{path} is truncated, damaged or no safetensors ({error}); download it again") from error


def _tensors(path: Path, file: safetensors.safe_open, names: Sequence[str]) -> dict[str, Tensor]:
    for name in names:
        dtype = file.get_slice(name).get_dtype()
        # integers are buffers, which are left out; whether a weight is among them, its name tells
        if dtype not in DTYPES and not dtype.startswith(("I", "U", "BOOL")):
            raise ValueError(f"{path}: {name} is stored as {dtype}; it must be one of {', '.join(DTYPES)}: save it so")
    return {name: file.get_tensor(name) for name in names}


def _nothing_to_read(folder: Path) -> str:
    others = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not others:
        return f"{folder} holds neither {WEIGHTS} nor {INDEX}; give a folder that save_pretrained has written"
    return (
        f"{folder} holds {others[0]} but no {WEIGHTS}; only safetensors is read, since other formats can run code when "
        "they are loaded: where you trust the file, load it with transformers and call save_pretrained"
    )
