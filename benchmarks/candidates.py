"""The attention sublayers that are timed beside each other: ours, plain SDPA, torch's, and on a GPU other kernels.

Each is a module called with x (B, T, D) and causality; `Work` counts what it has to compute.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import ATTENTIONS
from torch import Tensor, nn

from mhe_lightning.attention import MHE
from mhe_lightning.attention.folding import GroupedQuery
from mhe_lightning.tracing import count_flops

FORMS = tuple(form for form in ("shared_scores", "shared_kv") if "form" in inspect.signature(MHE).parameters)
"""Of MHE-ADD, that can be asked for."""

Core = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""From Q (B, n, T, d), K and V (B, g, T, d) and causality to the heads' outputs (B, n, T, d)."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """What a user writes."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=k.shape[1] != q.shape[1])


class Plain(nn.Module):
    """Attention as one writes it: linear layers around a kernel.

    Args:
        width: model width D.
        n_heads: heads n.
        n_kv_heads: heads of keys and values.
        core: the kernel.
    """

    def __init__(self, width: int, n_heads: int, n_kv_heads: int, core: Core = sdpa) -> None:
        super().__init__()
        self.head_dim, self.core = width // n_heads, core
        self.w_q = nn.Linear(width, width)
        self.w_k = nn.Linear(width, n_kv_heads * self.head_dim)
        self.w_v = nn.Linear(width, n_kv_heads * self.head_dim)
        self.w_o = nn.Linear(width, width)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.w_q, self.w_k, self.w_v))
        return self.w_o(self.core(q, k, v, is_causal).transpose(1, 2).flatten(2))

    @torch.no_grad()
    def load(self, weights: GroupedQuery) -> None:
        """Take over ``weights``."""
        for name in ("w_q", "w_k", "w_v"):
            linear = getattr(self, name)
            linear.weight.copy_(getattr(weights, name).flatten(0, 1))
            linear.bias.copy_(getattr(weights, f"b_{name[2:]}").flatten())
        self.w_o.weight.copy_(weights.w_o.flatten(1))
        self.w_o.bias.copy_(weights.b_o)


class TorchMHA(nn.Module):
    """`torch.nn.MultiheadAttention`, called as its documentation advises for speed."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, n_heads, batch_first=True)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        # with is_causal it asks for the mask, and does not read it
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype) if is_causal else None
        output: Tensor = self.attention(x, x, x, need_weights=False, attn_mask=mask, is_causal=is_causal)[0]
        return output

    @torch.no_grad()
    def load(self, weights: GroupedQuery) -> None:
        """Take over ``weights``, of as many heads of keys and values as of queries."""
        for kind in ("weight", "bias"):
            parts = [getattr(weights, f"{kind[0]}_{name}").flatten(0, 1) for name in "qkv"]
            getattr(self.attention, f"in_proj_{kind}").copy_(torch.cat(parts))
        self.attention.out_proj.weight.copy_(weights.w_o.flatten(1))
        self.attention.out_proj.bias.copy_(weights.b_o)


@dataclass(frozen=True)
class Work:
    """How wide the matrix products of a sublayer are.

    Args:
        projected: columns of the projections of x.
        scored: numbers that a pair of query and key multiplies for its scores, of all heads.
        weighed: columns that attention weights multiply, of all heads.
        merged: rows of the output projection.
    """

    projected: int
    scored: int
    weighed: int
    merged: int

    def flops(self, rows: int, length: int, width: int, is_causal: bool, backward: bool) -> int:
        """Two for each multiply–add."""
        pairs = rows * (length * (length + 1) // 2 if is_causal else length * length)
        linear = rows * length * width * (self.projected + self.merged)
        core = pairs * (self.scored + self.weighed)
        if backward:  # scores again; gradients of weights and values; of queries and keys
            linear, core = 3 * linear, core + pairs * (3 * self.scored + 2 * self.weighed)
        return 2 * (linear + core)


def works(width: int, n_heads: int) -> dict[str, Work]:
    """The work of every candidate but "mhe_add", whose form depends on the size."""
    d = width // n_heads

    def grouped(g: int) -> Work:
        return Work(width + 2 * g * d, width, width, width)

    forms = {
        "mhe_add_shared_kv": Work(3 * d, width, width, width),
        "mhe_add_shared_scores": Work(3 * d, d, width, width),
    }
    return {
        **dict.fromkeys(("sdpa_mha", "torch_mha", "mha", *GPU_CORES), grouped(n_heads)),
        **dict.fromkeys(("sdpa_gqa", "gqa"), grouped(2)),
        **dict.fromkeys(("sdpa_mqa", "mqa"), grouped(1)),
        "skv": Work(2 * width, width, width, width),
        "el": Work(width, width, width, width),
        "mhe_mul": forms["mhe_add_shared_kv"],
        "sha": Work(3 * d, d, d, d),
        **forms,
    }


def _backend(name: str) -> Core:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def core(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return sdpa(q, k, v, is_causal)

    return core


def _flex() -> Core:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention), {}

    def core(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        T = q.shape[2]
        if is_causal and T not in masks:
            masks[T] = create_block_mask(lambda b, h, t, s: t >= s, None, None, T, T, device=str(q.device))
        output: Tensor = compiled(q, k, v, block_mask=masks[T] if is_causal else None)
        return output

    return core


def _flash_attn() -> Core:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    def core(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        output: Tensor = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=is_causal)
        return output.transpose(1, 2)

    return core


GPU_CORES: dict[str, Callable[[], Core]] = {
    "sdpa_flash": partial(_backend, "FLASH_ATTENTION"),
    "sdpa_cudnn": partial(_backend, "CUDNN_ATTENTION"),
    "sdpa_efficient": partial(_backend, "EFFICIENT_ATTENTION"),
    "flex_attention": _flex,
    "flash_attn": _flash_attn,
}
PEERS = ("sdpa_mha", "torch_mha", "sdpa_gqa", "sdpa_mqa", *GPU_CORES)
OURS = (*ATTENTIONS, *(f"mhe_add_{form}" for form in FORMS))


def available(device: str) -> list[str]:
    """Candidates that can run on a device."""
    lacking = [] if torch.device(device).type == "cuda" else list(GPU_CORES)
    if importlib.util.find_spec("flash_attn") is None:
        lacking.append("flash_attn")
    return [name for name in (*PEERS, *OURS) if name not in lacking]


def make(name: str, width: int, n_heads: int) -> nn.Module:
    """A candidate with random weights, called with x and causality."""
    if name == "torch_mha":
        return TorchMHA(width, n_heads)
    if name in GPU_CORES:
        return Plain(width, n_heads, n_heads, GPU_CORES[name]())
    if name in PEERS:
        return Plain(width, n_heads, {"sdpa_mha": n_heads, "sdpa_gqa": 2, "sdpa_mqa": 1}[name])
    if name in ATTENTIONS:
        return ATTENTIONS[name](width=width, n_heads=n_heads)
    form: dict[str, Any] = {"form": name.removeprefix("mhe_add_")}
    return MHE(width=width, n_heads=n_heads, combine="add", **form)


def work_of(name: str, n_heads: int, x: Tensor, is_causal: bool) -> Work:
    """A candidate's work; that of "mhe_add" is the form's whose products torch counts as many of.

    Args:
        name: the candidate.
        n_heads: heads n.
        x: (B, T, D).
        is_causal: whether there is a causal mask.
    """
    known = works(x.shape[-1], n_heads)
    if name in known:
        return known[name]
    if not FORMS:
        return known["mhe_add_shared_kv"]
    x = x.detach().requires_grad_()

    def counted(candidate: str) -> int:
        module = make(candidate, x.shape[-1], n_heads).to(x)
        with count_flops() as counter:
            module(x, is_causal=is_causal).sum().backward()
        return counter.get_total_flops()

    return known["mhe_add_shared_scores" if counted(name) == counted("mhe_add_shared_scores") else "mhe_add_shared_kv"]
