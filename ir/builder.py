"""Building functions op by op: result types come from the op table, never from the caller."""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.module import Attribute, Function, Location, Module, Op, Operand, Value, Weight, WeightRef
from moec.ir.optable import OPS, infer
from moec.ir.types import TensorType, Type


class Builder:
    """Appends ops to one function of a module; `emit` infers the results and gives them fresh names."""

    def __init__(self, module: Module, name: str, attrs: dict[str, Attribute] | None = None) -> None:
        self.module = module
        self.function = Function(name, [], attrs=dict(attrs or {}))
        self._names = 0

    def arg(self, name: str, type: Type) -> Value:
        """Add an argument."""
        value = Value(name, type)
        self.function.args.append(value)
        return value

    def emit(
        self, name: str, *operands: Operand, loc: Location | None = None, **attrs: Attribute
    ) -> Value | tuple[Value, ...]:
        """Append an op; one result is returned bare, several as a tuple, none as an empty tuple.

        Raises TypeRuleError when the operands do not fit the op's rule, KeyError for an unknown op.
        """
        results = tuple(Value(self.fresh(), t) for t in infer(OPS[name], operands, attrs, self.module))
        self.function.ops.append(Op(name, list(operands), dict(attrs), list(results), loc))
        return results[0] if len(results) == 1 else results

    def fresh(self) -> str:
        """The next value name."""
        self._names += 1
        return str(self._names - 1)

    def returns(self, *values: Value) -> Function:
        """Finish: set the results and add the function to the module."""
        self.function.returns = list(values)
        self.module.functions[self.function.name] = self.function
        return self.function


def weight_ref(weight: Weight, indices: Sequence[Value] = ()) -> WeightRef:
    """A reference to `weight` at `indices`; index ranges left open become leading dims of the type."""
    assert isinstance(weight.type, TensorType)
    open_indices = weight.indices[len(indices) :]
    lead = tuple(stop - start for _, start, stop in open_indices)
    t = weight.type
    axes = (*_index_axes(weight, open_indices), *(t.sharding or [None] * len(t.shape)))
    sharding = axes if any(axes) else None
    return WeightRef(weight.name, tuple(indices), TensorType(t.dtype, lead + t.shape, t.quant, t.layout, sharding))


def _index_axes(weight: Weight, indices: Sequence[tuple[str, int, int]]) -> list[str | None]:
    """The mesh axis that cuts each index range: experts are cut where the program maps slots to them."""
    axis = next((str(op.attrs["axis"]) for op in weight.program.ops if op.name == "weight.slot"), None)
    return [axis if name == "e" else None for name, _, _ in indices]
