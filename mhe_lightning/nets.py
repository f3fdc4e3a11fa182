"""The net of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mhe_lightning.checkpoint import config_of
from mhe_lightning.parsing import Parser


def load_net(checkpoint: dict[str, Any]) -> nn.Module:
    """The net of a checkpoint, built from its config, with its weights, in eval mode.

    Raises:
        ValueError: it has no table of token embeddings, whose length is that of the vocabulary.
    """
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    spec = config_of(checkpoint)["model"]["init_args"]["net"]
    if "token_embedding.weight" not in weights:
        raise ValueError(f"the checkpoint's net, {spec.get('class_path')}, has no token_embedding; it is none of ours")
    net = build_net(spec, weights["token_embedding.weight"].shape[0])
    net.load_state_dict(weights)
    return net


def build_net(spec: Mapping[str, Any], vocab_size: int) -> nn.Module:
    """The net of a spec, in eval mode, with weights as they start.

    Args:
        spec: as in a config: ``class_path`` and ``init_args``.
        vocab_size: what the data say in an experiment.
    """
    parser = net_parser()
    given = {**spec, "init_args": {**spec.get("init_args", {}), "vocab_size": vocab_size}}
    net: nn.Module = parser.instantiate(parser.parse_object({"net": given})).net
    return net.eval()


def net_parser() -> Parser:
    """A parser of the spec of a net, as ``net``."""
    parser = Parser()
    parser.add_subclass_arguments(nn.Module, "net")
    return parser
