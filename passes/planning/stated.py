"""The precision of a single op as its own types state it, where a module's casts have been made."""

from __future__ import annotations

from moec.ir import CacheType, Op, TensorType, Value, WeightRef
from moec.passes.planning.precision import Recipe

LOW = ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "i8")


def low(t: object) -> bool:
    """Whether a type's elements have 8 bits or fewer."""
    return isinstance(t, TensorType | CacheType) and t.dtype in LOW


def quantised_inputs(op: Op) -> set[Value]:
    """The operands that a `quant.cast` made: they are paid for there."""
    return {o for o in op.operands if isinstance(o, Value) and low(o.type)}


def stated_recipe(op: Op) -> Recipe:
    """The planner's recipe that stands for an op's own types."""
    weights = [o.type.dtype for o in op.operands if isinstance(o, WeightRef) and isinstance(o.type, TensorType)]
    inputs = [o.type for o in op.operands if isinstance(o, Value) and isinstance(o.type, TensorType)]
    narrow = any(map(low, inputs))
    matrix = "bf16"
    if any(w == "fp4_e2m1" for w in weights):
        matrix = "mxfp4_weight"
    elif any(w in LOW for w in weights):
        matrix = "fp8_block" if narrow else "fp8_weight"
    elif weights and all(w == "f32" for w in weights) and all(t.dtype == "f32" for t in inputs if t.dtype[0] != "i"):
        matrix = "f32"
    return Recipe("as stated", matrix, matrix, "fp8" if narrow else "bf16")
