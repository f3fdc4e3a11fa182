"""Tiny models of transformers, as their users save them, and as ours."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from mhe_lightning.checkpoint import read_checkpoint
from mhe_lightning.interop.importing import Imported, import_checkpoint
from mhe_lightning.nets import load_net
from mhe_lightning.weights_only import write_weights

GPT2 = dict(
    vocab_size=60, n_positions=12, n_embd=8, n_layer=2, n_head=2, n_inner=20, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
BERT = dict(
    vocab_size=60,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=12,
    layer_norm_eps=1e-12,
)
MARIAN = dict(
    vocab_size=60,
    d_model=8,
    encoder_layers=2,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=20,
    decoder_ffn_dim=20,
    max_position_embeddings=12,
    activation_function="relu",
    scale_embedding=True,
    pad_token_id=59,
    decoder_start_token_id=59,
    eos_token_id=0,
)
CONFIGS = {"GPT2": (transformers.GPT2Config, GPT2), "Bert": (transformers.BertConfig, BERT)}


def stock(architecture: str, **options: object) -> transformers.PreTrainedModel:
    """A tiny model of a class of transformers, in which every parameter is drawn: no bias is zero, no norm one."""
    config_class, defaults = next(
        (pair for name, pair in CONFIGS.items() if architecture.startswith(name)), (transformers.MarianConfig, MARIAN)
    )
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config_class(**{**defaults, **options}))
    for name, parameter in model.named_parameters():
        if "embed_positions" not in name:
            nn.init.normal_(parameter, std=0.4)
    return model.eval()


def saved(model: transformers.PreTrainedModel, folder: Path, **changes: object) -> Path:
    """The model as save_pretrained writes it, with changes in config.json; a value of ... removes an option."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return folder


def edit_tensors(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written(found: Imported, out: Path) -> dict:
    """The checkpoint of a run directory that is made from what was imported."""
    return read_checkpoint(
        write_weights(
            out,
            config=found.config,
            state_dict=found.state_dict,
            tokenizer_json=found.tokenizer_json,
            origin=found.origin,
        )
    )


def native(model: transformers.PreTrainedModel, tmp_path: Path, **changes: object) -> tuple[nn.Module, dict]:
    """The net, in float64, and the whole checkpoint, after both were on disk."""
    checkpoint = written(import_checkpoint(saved(model, tmp_path / "hf", **changes)), tmp_path / "run")
    model.double()
    return load_net(checkpoint).double(), checkpoint


def batch(length: int = 9) -> SimpleNamespace:
    """Two rows of tokens, the second with padding on the right."""
    draw = torch.Generator().manual_seed(1)
    padding = torch.arange(length) < torch.tensor([[length], [length - 4]])
    return SimpleNamespace(
        tokens=torch.randint(1, 50, (2, length), generator=draw),
        segments=torch.randint(0, 2, (2, length), generator=draw),
        padding=padding,
    )


def task_of(checkpoint: dict, kind: type, net: nn.Module, **settings: object) -> nn.Module:
    """The task with its head, all of whose weights are the checkpoint's."""
    task = kind(net.float(), 1, **settings)
    task.load_state_dict(checkpoint["state_dict"])
    return task.double().eval()


def channels(width: int) -> list[int]:
    """Of each channel here its number there: sines and cosines alternate here, and are halves there."""
    halves = [list(range((width + 1) // 2)), list(range((width + 1) // 2, width))]
    return [halves[channel % 2][channel // 2] for channel in range(width)]
