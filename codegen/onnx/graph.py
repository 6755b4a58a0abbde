"""A list of ONNX nodes under construction: `g("MatMul", a, b)` appends a node and names its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET = 28
"""Operator set of the standard ops."""


class Graph:
    """Nodes in order, with fresh names that begin with `prefix`."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = prefix
        self._count = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def __call__(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attrs: Any) -> Any:
        """Append a node; returns the name of its result, or a list of names."""
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attrs))
        return names[0] if outputs == 1 else names

    def name(self) -> str:
        """A fresh name."""
        self._count += 1
        return f"{self._prefix}{self._count}"

    def const(self, value: Any, dtype: str = "int64") -> str:
        """A constant; equal ones are one node."""
        array = np.asarray(value, dtype=dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def f32(self, value: float) -> str:
        """A scalar."""
        return self.const(value, "float32")

    def as_name(self, value: str, name: str) -> None:
        """Give a result a name that is fixed."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))

    def dim(self, x: str, axis: int) -> str:
        """Size of one dim, i64[1]."""
        return str(self("Shape", x, start=axis, end=axis + 1 if axis != -1 else None)) if axis != -1 else self._last(x)

    def _last(self, x: str) -> str:
        return str(self("Shape", x, start=-1))

    def scalar(self, x: str) -> str:
        """i64[1] as a scalar."""
        return str(self("Squeeze", x, self.const([0])))

    def cast(self, x: str, dtype: str) -> str:
        """Another element type: int64, int32, float32 or bool."""
        kinds = {"int64": onnx.TensorProto.INT64, "int32": onnx.TensorProto.INT32, "float32": onnx.TensorProto.FLOAT}
        return str(self("Cast", x, to=kinds.get(dtype, onnx.TensorProto.BOOL)))

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps a dim, -1 takes the rest."""
        return str(self("Reshape", x, self.const(list(shape))))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return str(self("Unsqueeze", x, self.const(list(axes))))

    def concat(self, parts: Sequence[str], axis: int) -> str:
        return str(self("Concat", *parts, axis=axis))

    def split(self, x: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
        if len(sizes) == 1:
            return [x]
        return list(self("Split", x, self.const(list(sizes)), outputs=len(sizes), axis=axis))
