"""Compile every kernel for compute capabilities 8.0 and 9.0, without a device, and check that it fits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhe_lightning.attention.kernels import shared_scores_triton as host

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may take, by compute capability."""

NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
BACKWARD = ("scale_gradients", "key_gradients", "score_gradients", "query_products", "key_products")

Launches = dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]


class Recorder:
    """Stands for a kernel and notes what it is launched with."""

    def __init__(self, kernel: Any, launches: Launches) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        self.launches[self.kernel.__name__] = self.kernel, args, kwargs


def launches(capability: int) -> Launches:
    """The launches of a forward and a backward pass on tensors without data."""
    noted: Launches = {}
    tiles = host.choose_tiles(12, 64, torch.bfloat16, SHARED_MEMORY[capability])
    x = torch.empty(8, 1024, 64, dtype=torch.bfloat16, device="meta")
    heads, normalizer = x.new_empty(8, 1024, 12, 64), x.new_empty(8, 12, 1024, dtype=torch.float32)
    inputs = (x, x, x, x.new_empty(12, 64), x.new_empty(8, 1, 1, 1024, dtype=torch.bool), True, 0.125)
    backward = {name: Recorder(getattr(host.backward_kernels, name), noted) for name in BACKWARD}
    with mock.patch.multiple(
        host,
        weigh_values=Recorder(host.weigh_values, noted),
        forward_kernel=Recorder(host.forward_kernel, noted),
        backward_kernels=SimpleNamespace(**backward),
        _tiles=lambda q, e_q: tiles,
    ):
        host.forward(*inputs)
        host.backward(heads, *inputs, heads, normalizer)
    return noted


def compile_for(capability: int, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of shared memory that the compiled kernel takes."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    signature, constants, attributes = {}, dict(kwargs), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = NAMES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            constants[name] = 1
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or (signature.get(name) == "i32" and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(constants, "constexpr"))
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


for capability, limit in SHARED_MEMORY.items():
    for name, launch in launches(capability).items():
        shared = compile_for(capability, *launch)
        assert shared <= limit, f"{name} takes {shared} bytes of shared memory of the {limit} that {capability} has"
        print("compiled", name, capability, shared)
