"""Run directories of weights to use and not to go on from: what another library, or a conversion, has made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from torch import Tensor

from mhe_lightning import run
from mhe_lightning.callbacks.run_record import CONFIG
from mhe_lightning.checkpoint import FORMAT_VERSION, RECORD, SUFFIX, TOKENIZER_HASH, AtomicCheckpointIO
from mhe_lightning.data.tokenizer import serialized_hash
from mhe_lightning.files import build_new_folder, write_text

ORIGIN = "origin"
"""Key in a checkpoint's record of what its weights were made from."""

CHECKPOINT = f"step={0:08d}{SUFFIX}"


def write_weights(
    out: Path,
    *,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    tokenizer_json: str | None,
    origin: Mapping[str, Any],
) -> Path:
    """Write a run directory with one checkpoint of weights, complete or not at all.

    Every verb takes it that takes a trained model, and ``fit --init_from`` does; ``fit --ckpt_path`` does not, as there
    is no state of an optimizer.

    Args:
        out: the run directory, which must not exist or be empty.
        config: resolved: ``model`` with ``class_path`` and ``init_args``, of which ``net`` has all arguments that `fit`
            would write, and whatever else of an experiment is known.
        state_dict: the task's, ``net.…`` and perhaps ``head.…``; tensors that share memory stay tied. ``tokens_seen``
            is 0 where it is not given.
        tokenizer_json: text of a run's tokenizer.json, as ``load_tokenizer(path).to_str()`` gives it; None where there
            is no tokenizer.
        origin: what the weights were made from, plain data, kept in the checkpoint's record.

    Returns:
        The checkpoint.

    Raises:
        ValueError: ``out`` exists.
    """
    text = yaml.safe_dump(dict(config), sort_keys=False)
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": {"tokens_seen": torch.zeros((), dtype=torch.long), **state_dict},
        RECORD: {
            "format_version": FORMAT_VERSION,
            "config": text,
            TOKENIZER_HASH: None if tokenizer_json is None else serialized_hash(tokenizer_json),
            ORIGIN: dict(origin),
        },
    }

    def build(folder: Path) -> None:
        write_text(folder / CONFIG, text)
        if tokenizer_json is not None:
            write_text(folder / run.TOKENIZER, tokenizer_json)
        AtomicCheckpointIO().save_checkpoint(checkpoint, folder / "checkpoints" / CHECKPOINT)

    build_new_folder(out, build)
    return out / "checkpoints" / CHECKPOINT
