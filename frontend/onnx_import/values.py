"""Values of an ONNX graph while it runs: torch tensors, and small arrays of numbers that are known beforehand.

Shapes and what is computed of them are arrays whose elements may be symbolic integers, so that a reshape gets sizes and
not tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moec.frontend.onnx_import.pieces import Pieces, Unsupported

KNOWN = 1024
"""Most elements of a constant that is kept as an array of numbers."""

Known = np.ndarray[Any, Any]


@dataclass
class Step:
    """A node: what it computes, from and into which values."""

    op: str
    domain: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any]
    opset: int
    scope: str = ""
    """The path of the module that the node came from, where the file tells."""


@dataclass
class Call:
    """A step while it runs, and what made the values that it takes."""

    step: Step
    made: dict[str, tuple[Step, list[Any]]] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute; text as str."""
        value = self.step.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def parameter(self, number: int, step: Step | None = None) -> bool:
        """Whether an input is a parameter."""
        inputs = (step or self.step).inputs
        return number < len(inputs) and inputs[number] in self.parameters

    def linear(self, number: int) -> list[Any] | None:
        """The inputs of the product with a parameter that made an input."""
        found = self.made.get(self.step.inputs[number])
        plain = found is not None and found[0].op == "MatMul" and self.parameter(1, found[0])
        return found[1] if plain and found is not None and found[1][1].ndim == 2 else None

    def origin(self, number: int, *ops: str) -> list[Any] | None:
        """The inputs of the node that made an input, when it is one of `ops`."""
        inputs = self.step.inputs
        found = self.made.get(inputs[number]) if number < len(inputs) else None
        return found[1] if found is not None and found[0].op in ops else None


def known(value: Any) -> Known | None:
    """A value as numbers, when it is known beforehand."""
    return value if isinstance(value, np.ndarray) else None


def number(value: Any) -> Any:
    """The single number of a known value, None where it has none."""
    if isinstance(value, np.ndarray) and value.size == 1:
        item = value.reshape(-1)[0]
        if isinstance(item, np.float32 | np.float16):
            return float(str(item))  # 1e-06, not the nearest number of 32 bits
        return item.item() if isinstance(item, np.generic) else item
    return None


def ints(value: Any) -> list[Any]:
    """A known list of integers, maybe symbolic. Raises Unsupported."""
    if not isinstance(value, np.ndarray):
        raise Unsupported("it takes sizes that depend on the values of tensors")
    return [v.item() if isinstance(v, np.generic) else v for v in value.reshape(-1)]


def tensor(value: Any) -> torch.Tensor:
    """A value as a tensor. Raises Unsupported."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Pieces):
        return value.whole()
    if not isinstance(value, np.ndarray):
        raise Unsupported("an input is missing")
    if value.dtype == object:
        if value.size != 1 and not all(isinstance(v, int) for v in value.reshape(-1)):
            raise Unsupported("it takes a list of sizes as a tensor")
        if value.size == 1 and not isinstance(value.reshape(-1)[0], int):
            return torch.full(value.shape, value.reshape(-1)[0], dtype=torch.int64)
        return torch.tensor(value.astype(np.int64))
    return torch.tensor(value)


def operand(value: Any) -> Any:
    """A value for a torch function that takes tensors and numbers alike."""
    single = number(value)
    return single if single is not None else tensor(value)


def settle(value: torch.Tensor) -> torch.Tensor | Known:
    """A constant: as numbers when it is small."""
    few = value.numel() <= KNOWN if not value.is_floating_point() else value.numel() == 1
    if few and value.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        array: Known = value.detach().numpy()
        return array
    return value


def _gather(c: Call, data: Known, index: Known) -> Any:
    return np.take(data, index.astype(np.int64), axis=c.attr("axis", 0))


def _slice(c: Call, data: Known, starts: Known, ends: Known, axes: Any = None, steps: Any = None) -> Any:
    at = [slice(None)] * data.ndim
    for i, axis in enumerate(ints(axes) if axes is not None else range(len(starts))):
        at[axis] = slice(ints(starts)[i], ints(ends)[i], ints(steps)[i] if steps is not None else 1)
    return data[tuple(at)]


def _squeeze(c: Call, data: Known, axes: Any = None) -> Any:
    where = c.attr("axes") if axes is None else ints(axes)
    return np.squeeze(data, tuple(where) if where is not None else None)


def _unsqueeze(c: Call, data: Known, axes: Any = None) -> Any:
    return np.expand_dims(data, tuple(c.attr("axes") if axes is None else ints(axes)))


def _divide(c: Call, a: Known, b: Known) -> Any:
    return a / b if a.dtype.kind == "f" else a // b


def _cast(c: Call, data: Known) -> Any:
    kind = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64}.get(c.attr("to"))
    if kind is None:
        raise Unsupported(f"a cast of numbers to type {c.attr('to')}")
    return data if data.dtype == object and kind in (np.int32, np.int64) else data.astype(kind)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda c, *values: function(*values)


def _product(c: Call, data: Known, axes: Any = None) -> Any:
    keep = bool(c.attr("keepdims", 1))
    return np.asarray(np.prod(data, keepdims=keep))


KNOWN_OPS: dict[str, Callable[..., Any]] = {
    "Add": _plain(np.add),
    "Sub": _plain(np.subtract),
    "Mul": _plain(np.multiply),
    "Div": _divide,
    "Mod": _plain(np.mod),
    "Neg": _plain(np.negative),
    "Max": _plain(np.maximum),
    "Min": _plain(np.minimum),
    "Equal": _plain(np.equal),
    "Greater": _plain(np.greater),
    "GreaterOrEqual": _plain(np.greater_equal),
    "Less": _plain(np.less),
    "LessOrEqual": _plain(np.less_equal),
    "Not": _plain(np.logical_not),
    "And": _plain(np.logical_and),
    "Or": _plain(np.logical_or),
    "Sqrt": _plain(np.sqrt),
    "Reciprocal": _plain(np.reciprocal),
    "Where": _plain(np.where),
    "Identity": _plain(lambda x: x),
    "Gather": _gather,
    "Slice": _slice,
    "Concat": lambda c, *parts: np.concatenate(parts, axis=c.attr("axis")),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Cast": _cast,
    "ReduceProd": _product,
    "Reshape": lambda c, x, to: x.reshape([int(d) for d in ints(to)]),
    "Expand": lambda c, x, to: np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(ints(to)))),
    "Range": lambda c, start, stop, step: np.arange(number(start), number(stop), number(step)),
    "Shape": lambda c, x: np.array(x.shape[slice(c.attr("start", 0), c.attr("end"))]),
    "Size": lambda c, x: np.array(x.size),
}


def run_known(c: Call, values: Sequence[Any]) -> Known | None:
    """The result of a step all of whose inputs are numbers; None when it has to run on tensors."""
    function = KNOWN_OPS.get(c.step.op) if c.step.domain in ("", "ai.onnx") else None
    if function is None or not all(v is None or isinstance(v, np.ndarray) for v in values):
        return None
    if c.step.op in ("Range", "Expand") and any(
        not isinstance(v, int | float) for sizes in values[c.step.op == "Expand" :] for v in ints(sizes)
    ):
        return None
    return np.asarray(function(c, *values))
