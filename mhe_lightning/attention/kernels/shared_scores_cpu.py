"""Shared scores on a CPU, compiled: what `blocks` does of them in plain torch, in float32."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_ssize_t, c_void_p

import torch
from torch import Tensor

from mhe_lightning.attention.kernels import compiled
from mhe_lightning.attention.kernels.blocks import Chunk, through_r

SOURCE = "shared_scores_cpu.c"


class _Matrix(ctypes.Structure):
    """Numbers (rows of a batch, tokens, …), those of a token next to each other."""

    _fields_ = (("data", c_void_p), ("row", c_ssize_t), ("token", c_ssize_t))

    @classmethod
    def of(cls, t: Tensor) -> _Matrix:
        assert t.dtype == torch.float32
        assert t.shape[2] == 1 or t.stride(2) == 1 or not t.numel()
        return cls(t.data_ptr(), t.stride(0), t.stride(1))


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, c_ssize_t) for name in ("B", "T", "S", "n", "d")),
        *((name, _Matrix) for name in ("q", "k", "v", "r")),
        ("mask", c_void_p),
        *((name, c_ssize_t) for name in ("mask_row", "mask_query", "mask_key")),
        *((name, c_int) for name in ("is_causal", "threads")),
        ("scale", c_float),
    )


class _Results(ctypes.Structure):
    _fields_ = tuple((name, _Matrix) for name in ("heads", "sums", "level"))


class _Gradients(ctypes.Structure):
    _fields_ = tuple((name, _Matrix) for name in ("q", "k", "v", "r"))


def applies(chunk: Chunk) -> bool:
    """Whether the functions here can take the place of their twins in `blocks`."""
    return chunk.q.dtype == torch.float32 and chunk.q.is_cpu and compiled.load(SOURCE) is not None


def shared_forward(chunk: Chunk, heads: Tensor, sums: Tensor, level: Tensor) -> None:
    """As `blocks.shared_forward`."""
    problem, _keep = _problem(chunk)
    B, T, n, d = heads.shape
    results = _Results(*(_Matrix.of(t) for t in (heads.view(B, T, n * d), sums, level)))
    _call("shared_score_forward", problem, results)


def shared_backward(
    chunk: Chunk,
    grad: Tensor,
    heads: Tensor,
    sums: Tensor,
    level: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
) -> Tensor:
    """As `blocks.shared_backward`."""
    problem, _keep = _problem(chunk)
    grad, heads = grad.flatten(2).contiguous(), heads.flatten(2).contiguous()
    results = _Results(*(_Matrix.of(t) for t in (heads, sums, level)))
    d_r = chunk.r.new_empty(chunk.r.shape)
    gradients = _Gradients(*(_Matrix.of(t) for t in (d_q, d_k, d_v, d_r)))
    _call("shared_score_backward", problem, results, _Matrix.of(grad), gradients)
    return through_r(chunk, d_r, d_k)


def _problem(chunk: Chunk) -> tuple[_Problem, tuple[Tensor | None, ...]]:
    """The arguments, and the tensors that have to live as long as they do."""
    (B, T, d), S, n = chunk.q.shape, chunk.k.shape[1], chunk.e.shape[0]
    q, k, v, r = (t if t.stride(-1) == 1 else t.contiguous() for t in (chunk.q, chunk.k, chunk.v, chunk.r))
    mask = None if chunk.mask is None else chunk.mask.expand(B, T, S)
    place = (None, 0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride())
    matrices = (_Matrix.of(t) for t in (q, k, v, r))
    rest = (int(chunk.is_causal), torch.get_num_threads(), chunk.scale)
    problem = _Problem(B, T, S, n, d, *matrices, *place, *rest)
    return problem, (q, k, v, r, mask)


def _call(name: str, *arguments: ctypes.Structure) -> None:
    library = compiled.load(SOURCE)
    assert library is not None
    if getattr(library, name)(*(ctypes.byref(argument) for argument in arguments)) < 0:
        raise MemoryError("there is no memory for the operands of shared scores; take fewer tokens at once")
