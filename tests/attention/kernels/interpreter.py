"""The Triton kernels for tests: as they are where there is a GPU, else in Triton's interpreter.

Import ``shared_scores_triton`` from here. Whether a function is compiled or interpreted is decided when it is defined.
Triton itself is imported by Lightning long before, so its own functions are defined again; the environment variable is
set only while the kernels are imported, and nothing else sees it.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _real_bfloat16(interpreter: Any, tl: Any) -> None:
    """Triton 3.9's interpreter multiplies the bit patterns of bfloat16 matrices and cuts float32 off where the hardware
    rounds to nearest, ties to even: give both their meaning."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widen(handle: Any) -> Any:
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = widen(a), widen(b)
        return dot(self, a, b, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) == (tl.bfloat16, tl.float32):
            return widen(source)
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, target)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


if DEVICE == "cuda":
    from mhe_lightning.attention.kernels import shared_scores_triton
else:
    import triton.experimental.gluon  # a launch imports it, and it asserts that Triton's functions are to be compiled
    import triton.language
    from triton.language import standard
    from triton.runtime import interpreter, jit

    for name, function in list(vars(standard).items()):
        if isinstance(function, jit.JITFunction):
            for module in (standard, triton.language):
                if getattr(module, name, None) is function:
                    setattr(module, name, interpreter.InterpretedFunction(function.fn))
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        from mhe_lightning.attention.kernels import shared_scores_triton
    _real_bfloat16(interpreter, triton.language)

__all__ = ["DEVICE", "shared_scores_triton"]
