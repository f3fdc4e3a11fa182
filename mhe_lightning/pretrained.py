"""Begin training from a pretrained net: what fits is loaded, what does not is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from torch import nn

from mhe_lightning import run
from mhe_lightning.checkpoint import RECORD, TOKENIZER_HASH, config_of, read_checkpoint, run_of

WITHOUT_WEIGHTS = ("dropout", "loss_chunk", "vocab_size", "init_std", "position_init")
"""Arguments of a net that may differ: they change no weights (the tokenizer is compared instead of its size)."""


def load_pretrained(task: nn.Module, path: Path, *, net_spec: Mapping[str, Any], tokenizer_sha256: str | None) -> str:
    """Load the net of a checkpoint into ``task.net``, in place.

    A head is loaded where the task pretrains one and the checkpoint has the same kind of it, else it stays new.

    Args:
        task: has the net as ``net``, and perhaps a ``head`` of its own.
        path: the checkpoint.
        net_spec: class and arguments of ``task.net``, as in its config.
        tokenizer_sha256: of the tokenizer of the task's data; None is not compared.

    Returns:
        What was loaded, what is new and what was left, for people.

    Raises:
        ValueError: the checkpoint is of another net or tokenizer; the message names every difference.
    """
    checkpoint = read_checkpoint(path)
    differences = [
        f"model.net.{key.replace('init_args.', '')} is {theirs} there and {ours} here"
        for key, theirs, ours in run.differences(
            _explicit(config_of(checkpoint)["model"]["init_args"]["net"]), _explicit(net_spec)
        )
        if key.rpartition(".")[2] not in WITHOUT_WEIGHTS
    ]
    theirs = checkpoint[RECORD].get(TOKENIZER_HASH)
    if theirs is not None and tokenizer_sha256 is not None and theirs != tokenizer_sha256:
        differences.append(
            f"the tokenizer is {theirs[:12]}… there and {tokenizer_sha256[:12]}… here (data.tokenizer null takes "
            "the checkpoint's)"
        )
    if differences:
        raise ValueError(f"{path} does not fit this config: " + "; ".join(differences))
    weights = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    if task.pretrains and _has_the_head_of(task, checkpoint):
        weights.update({k: v for k, v in checkpoint["state_dict"].items() if k.startswith("head.")})
    own = {k for k, _ in task.named_parameters(remove_duplicate=False)}
    misshapen = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(parameter.shape)} here"
        for name, parameter in task.named_parameters(remove_duplicate=False)
        if name in weights and weights[name].shape != parameter.shape
    ]
    if misshapen:
        raise ValueError(f"{path} does not fit this config: " + "; ".join(misshapen))
    missing, unexpected = task.load_state_dict(weights, strict=False)
    new = sorted(name for name in missing if name in own)
    left = sorted({*unexpected, *(k for k in checkpoint["state_dict"] if k not in weights and k.startswith("head."))})
    loaded = sum(parameter.numel() for name, parameter in task.named_parameters() if name in weights)
    return (
        f"from {path}: {loaded:,} weights loaded; new: {', '.join(new) or 'nothing'}; "
        f"left: {', '.join(left) or 'nothing'}"
    )


def _explicit(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A net's spec with the arguments that follow from others where they are not given."""
    arguments = dict(spec.get("init_args", {}))
    if "width" in arguments and arguments.get("ff_width", 0) is None:
        arguments["ff_width"] = 4 * arguments["width"]
    if "n_layers" in arguments and arguments.get("n_decoder_layers", 0) is None:
        arguments["n_decoder_layers"] = arguments["n_layers"]
    for place in ("encoder_attention", "decoder_attention", "cross_attention"):
        if place in arguments and arguments[place] is None:
            arguments[place] = arguments.get("attention")
    return {**spec, "init_args": arguments}


def _has_the_head_of(task: nn.Module, checkpoint: dict[str, Any]) -> bool:
    """Whether the task is of the checkpoint's class and its head of the same shapes."""
    theirs = {k: v.shape for k, v in checkpoint["state_dict"].items() if k.startswith("head.")}
    ours = {k: v.shape for k, v in task.state_dict().items() if k.startswith("head.")}
    return config_of(checkpoint)["model"]["class_path"].endswith(f".{type(task).__name__}") and ours == theirs


def take_tokenizer(data_spec: Namespace, begins_with: str | None) -> None:
    """Where data take any tokenizer and their spec names none, name that of the run that a model begins with.

    Args:
        data_spec: the data module's arguments in a parsed config; ``tokenizer`` is set in place.
        begins_with: a run directory or a checkpoint in one; None changes nothing.
    """
    if begins_with is None or data_spec.get("tokenizer", "") is not None:
        return
    folder, _ = run_of(Path(begins_with))
    if (folder / run.TOKENIZER).is_file():
        data_spec.tokenizer = str(folder / run.TOKENIZER)
