"""Checkpoints that each process writes its own part of, and that any number of processes reads.

A checkpoint is a folder: torch's distributed checkpoint (`torch.distributed.checkpoint`), one file a process, with the
index in JSON where torch would pickle it; everything that is not spread over the processes in ``rest.pt``; and
``manifest.json`` with the checksum of every file, which is written last, before the folder takes its name.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future as TorchFuture

from mhe_lightning.files import sha256, sync_folder, write_bytes, write_text

REST = "rest.pt"
MANIFEST = "manifest.json"
STATE, OPTIMIZERS = "state_dict", "optimizer_states"
"""Keys in a Lightning checkpoint of the model's parameters and buffers, and of the optimizers' states."""

TIES = "ties"
"""Key in ``rest.pt`` of the parameters that are others too."""


# Writing


def save(
    checkpoint: dict[str, Any],
    path: Path,
    group: dist.ProcessGroup | None,
    *,
    ties: Mapping[str, str],
    wait: bool,
) -> Future[Any] | None:
    """Write a checkpoint, each process its part; complete or not at all. A collective call.

    Args:
        checkpoint: Lightning's, with spread tensors in it. What is not spread is taken from the first process.
        path: the folder to be.
        group: of all processes, on the CPU; no one else may use it until this has ended.
        ties: the names of parameters that are others too, and which.
        wait: whether to return when all is written, or when all is copied, and training can go on.

    Returns:
        With ``wait`` None, else what ends when all is written; it raises what went wrong.
    """
    spread, rest = _split(checkpoint, ties)
    building = building_folder(path)
    if dist.get_rank() == 0:
        shutil.rmtree(building, ignore_errors=True)
    dist.barrier(group=group)
    building.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save(rest, content)  # now, for training goes on and changes it
    writer = _Writer(building, path, content.getvalue())
    if wait:
        dcp.save(spread, storage_writer=writer, process_group=group)
        return None
    future: Any = dcp.async_save(spread, storage_writer=writer, process_group=group)
    return future


def building_folder(path: Path) -> Path:
    """Where a checkpoint is while it is written."""
    return path.with_name(f".{path.name}.tmp")


def _split(checkpoint: dict[str, Any], ties: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is spread over the processes, by its place in the checkpoint, and the checkpoint without it."""
    spread: dict[str, Tensor] = {}
    rest = {**checkpoint, STATE: {}, OPTIMIZERS: [], TIES: dict(ties)}
    for name, value in checkpoint[STATE].items():
        if isinstance(value, DTensor):
            if name not in ties:
                spread[f"{STATE}/{name}"] = value
            rest[STATE][name] = None  # keeps its place in the order
        else:
            rest[STATE][name] = value
    for number, optimizer in enumerate(checkpoint.get(OPTIMIZERS, ())):
        state: dict[int, dict[str, Any]] = {}
        for index, values in optimizer["state"].items():
            state[index] = {}
            for name, value in values.items():
                if isinstance(value, DTensor):
                    spread[f"{OPTIMIZERS}/{number}/{index}/{name}"] = value
                    state[index][name] = None
                else:
                    state[index][name] = value
        rest[OPTIMIZERS].append({**optimizer, "state": state})
    return spread, rest


@dataclass
class _FileInfo(_StorageInfo):
    """Where a chunk lies, and the checksum of its file."""

    sha256: str = ""


class _Writer(dcp.FileSystemWriter):
    """torch's writer, whose index is JSON, and whose folder is renamed when it is complete."""

    def __init__(self, building: Path, path: Path, rest: bytes) -> None:
        super().__init__(building, single_file_per_rank=True, sync_files=True)
        self.building = building
        self.target = path
        self.rest = rest

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        written = super().write_data(plan, planner).value()
        sums = {
            name: sha256(self.building / name) for name in {result.storage_data.relative_path for result in written}
        }
        checked = []
        for result in written:
            at = result.storage_data
            info = _FileInfo(at.relative_path, at.offset, at.length, sha256=sums[at.relative_path])
            checked.append(replace(result, storage_data=info))
        future: TorchFuture[list[WriteResult]] = TorchFuture()
        future.set_result(checked)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for part in results for result in part}
        files = {place.relative_path: place.sha256 for place in places.values()}
        write_bytes(self.building / REST, self.rest)
        files[REST] = sha256(self.building / REST)
        sizes = {name: (self.building / name).stat().st_size for name in files}
        tensors = {name: _tensor_entry(name, entry, places) for name, entry in metadata.state_dict_metadata.items()}
        manifest = {"files": files, "sizes": sizes, "tensors": tensors}
        write_text(self.building / MANIFEST, json.dumps(manifest) + "\n")
        earlier = self.target.with_name(f".{self.target.name}.earlier.tmp")
        if self.target.exists():  # of a course that this run has left, and comes by again
            os.rename(self.target, earlier)
        os.rename(self.building, self.target)
        sync_folder(self.target.parent)
        shutil.rmtree(earlier) if earlier.is_dir() else earlier.unlink(missing_ok=True)


def _tensor_entry(name: str, entry: Any, places: Mapping[MetadataIndex, _FileInfo]) -> dict[str, Any]:
    assert isinstance(entry, TensorStorageMetadata), name
    chunks = []
    for chunk in entry.chunks:
        place = places[MetadataIndex(name, chunk.offsets)]
        chunks.append(
            {
                "offsets": list(chunk.offsets),
                "sizes": list(chunk.sizes),
                "file": place.relative_path,
                "start": place.offset,
                "length": place.length,
            }
        )
    return {
        "dtype": str(entry.properties.dtype).removeprefix("torch."),
        "size": list(entry.size),
        "chunks": chunks,
    }


# Reading


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of this kind."""
    return path.is_dir() and (path / MANIFEST).is_file()


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint by its checksums, or None."""
    manifest = _manifest(path)
    if manifest is None:
        return f"has no readable {MANIFEST}, so it was not written completely"
    for name, size in manifest["sizes"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or sha256(file) != manifest["files"][name]:
            return f"does not match the checksum of its file {name}: it is truncated or damaged"
    return None


def read(path: Path) -> dict[str, Any]:
    """The whole checkpoint in this process, as one process would have written it."""
    manifest = _manifest(path)
    if manifest is None:
        raise ValueError(f"{path} has no readable {MANIFEST}")
    whole = {
        name: torch.empty(entry["size"], dtype=getattr(torch, entry["dtype"]))
        for name, entry in manifest["tensors"].items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        dcp.load(dict(whole), storage_reader=_Reader(path, manifest), no_dist=True)
    return _merge(read_rest(path), whole)


def read_rest(path: Path) -> dict[str, Any]:
    """What of a checkpoint is not spread over files; None stands for what is."""
    rest: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=True)
    return rest


def read_into(path: Path, spread: dict[str, Tensor]) -> None:
    """Fill tensors with what a checkpoint has in their places, each process its parts. A collective call."""
    manifest = _manifest(path)
    assert manifest is not None
    dcp.load(spread, storage_reader=_Reader(path, manifest))


def place_in(spread: Tensor, whole: Tensor) -> None:
    """Fill ``spread``, which may be over several processes, with ``whole``; nothing is sent."""
    if not isinstance(spread, DTensor):
        spread.copy_(whole)
        return
    shape, offsets = compute_local_shape_and_global_offset(whole.shape, spread.device_mesh, spread.placements)
    part = whole[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]
    spread.to_local().copy_(part)


def places(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """Of each tensor in a checkpoint its place as files name it, what it stands in, and its key there."""
    for name in checkpoint[STATE]:
        yield f"{STATE}/{name}", checkpoint[STATE], name
    for number, optimizer in enumerate(checkpoint.get(OPTIMIZERS, ())):
        for index, values in optimizer["state"].items():
            for name in values:
                yield f"{OPTIMIZERS}/{number}/{index}/{name}", values, name


def _merge(rest: dict[str, Any], whole: Mapping[str, Tensor]) -> dict[str, Any]:
    for place, holder, key in places(rest):
        if place in whole:
            holder[key] = whole[place]
    for name, other in rest.pop(TIES).items():
        rest[STATE][name] = rest[STATE][other]
    return rest


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.keys() >= {"files", "sizes", "tensors"} else None


class _Reader(dcp.FileSystemReader):
    """torch's reader, whose index is that of `_Writer`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        super().__init__(path)
        self.manifest = manifest

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, where = {}, {}
        for name, entry in self.manifest["tensors"].items():
            chunks = []
            for chunk in entry["chunks"]:
                offsets = torch.Size(chunk["offsets"])
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk["sizes"])))
                where[MetadataIndex(name, offsets)] = _StorageInfo(chunk["file"], chunk["start"], chunk["length"])
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)
        return Metadata(dict(tensors), storage_data=where, storage_meta=StorageMeta(load_id=self.load_id))
