"""An ONNX model, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhe_lightning.extras import require

OPSET = 20
"""The first version of ONNX's operators that has GELU."""
EXTERNAL = 1 << 30
"""Bytes of weights from which they are stored in a file of their own: a protobuf ends at 2 GiB."""


class Graph:
    """Collects the nodes, weights, inputs and outputs of an ONNX model; values are known by their names."""

    def __init__(self) -> None:
        self._helper = require("onnx.helper", "onnx", "export a model to it")
        self._types = require("onnx", "onnx", "export a model to it").TensorProto
        self._from_array = require("onnx.numpy_helper", "onnx", "export a model to it").from_array
        self._nodes: list[Any] = []
        self._weights: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self.bytes = 0

    def input(self, name: str, shape: Sequence[int | str], *, tokens: bool = False) -> str:
        """An input, int64 if it is of ``tokens``, else float32; sizes that vary are given by names."""
        kind = self._types.INT64 if tokens else self._types.FLOAT
        self._inputs.append(self._helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str]) -> None:
        """Give a value out, as float32, by this name."""
        self._nodes.append(self._helper.make_node("Identity", [value], [name]))
        self._outputs.append(self._helper.make_tensor_value_info(name, self._types.FLOAT, list(shape)))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Apply an operator that has one output."""
        name = f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(self._helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        """Parts of the last axis."""
        names = [f"split_{len(self._nodes)}_{i}" for i in range(len(sizes))]
        self._nodes.append(self._helper.make_node("Split", [x, self.integers(*sizes)], names, axis=-1))
        return names

    def weight(self, name: str, tensor: Tensor) -> str:
        """A weight, stored once for each name, in float32."""
        if name not in self._weights:
            array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            self._weights[name] = self._from_array(array, name)
            self.bytes += array.nbytes
        return name

    def integers(self, *values: int) -> str:
        """A constant, (len(values),) int64."""
        name = f"integers_{'_'.join(map(str, values))}"
        if name not in self._weights:
            self._weights[name] = self._from_array(torch.tensor(values).numpy(), name)
        return name

    def number(self, value: float) -> str:
        """A constant, () float32."""
        return self.weight(f"number_{value!r}", torch.tensor(value))

    def size(self, x: str, axis: int) -> str:
        """A size of a value, (1,) int64."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def reshape(self, x: str, *shape: int | str) -> str:
        """Reshape; a size is a number, with 0 (as it is) and -1 (what is left), or the name of one, (1,) int64."""
        if all(isinstance(size, int) for size in shape):
            return self.op("Reshape", x, self.integers(*shape))  # type: ignore[arg-type]
        parts = [self.integers(size) if isinstance(size, int) else size for size in shape]
        return self.op("Reshape", x, self.op("Concat", *parts, axis=0))

    def linear(self, name: str, x: str, weight: Tensor, bias: Tensor | None) -> str:
        """``x Wᵀ + b`` with a weight (out, in)."""
        y = self.op("MatMul", x, self.weight(f"{name}.weight", weight.T))
        return y if bias is None else self.op("Add", y, self.weight(f"{name}.bias", bias))

    def scores(self, x: str, table: str, vocab_size: int, width: int) -> str:
        """(B, T, D) → (B, T, V) by a table (V, D), which may be an embedding that is stored already."""
        flat = self.op("Gemm", self.reshape(x, -1, width), table, transB=1)
        return self.reshape(flat, self.size(x, 0), self.size(x, 1), vocab_size)

    def norm(self, name: str, x: str, norm: nn.LayerNorm) -> str:
        """A layer norm."""
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        parameters = (self.weight(f"{name}.weight", norm.weight), self.weight(f"{name}.bias", bias))
        return self.op("LayerNormalization", x, *parameters, axis=-1, epsilon=norm.eps)

    def activation(self, kind: str, x: str) -> str:
        """A feed-forward net's activation, by our name."""
        if kind == "relu":
            return self.op("Relu", x)
        return self.op("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def save(self, path: Path) -> None:
        """Check the graph, shapes included, and write it."""
        onnx = require("onnx", "onnx", "export a model to it")
        graph = self._helper.make_graph(
            self._nodes, path.stem, self._inputs, self._outputs, initializer=list(self._weights.values())
        )
        opset = self._helper.make_opsetid("", OPSET)
        # the oldest version of the format that has these operators, which the most engines read
        version = self._helper.find_min_ir_version_for([opset])
        model = self._helper.make_model(graph, opset_imports=[opset], ir_version=version, producer_name="mhe_lightning")
        options = {"save_as_external_data": True, "location": f"{path.name}.data"} if self.bytes >= EXTERNAL else {}
        onnx.save_model(model, str(path), **options)
        onnx.checker.check_model(str(path), full_check=True)
