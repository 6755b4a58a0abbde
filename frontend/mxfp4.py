"""Checkpoints whose experts are stored in MXFP4 (gpt-oss): loads of such a tensor become loads of blocks and scales."""

from __future__ import annotations

from moec.frontend.safetensors_header import TensorEntry
from moec.ir import Module, Op, TensorType, Value, Weight
from moec.ir.module import Operand
from moec.ir.ops.weight_sources import tensor_name
from moec.ir.optable import OPS, infer
from moec.ir.rewrite import fresh_names, replace_values

BLOCK = 32
"""Elements that share a scale (OCP MX specification): 16 bytes of two."""


def read_blocks(module: Module, tensors: dict[str, TensorEntry]) -> int:
    """Rewrite the programs of weights whose tensor is missing where its `_blocks` and `_scales` are there.

    A stored block tensor is `[experts, out, groups, 16]`: no transpose. Returns how many weights were rewritten.
    """
    count = 0
    for weight in module.weights.values():
        loads = [op for op in weight.program.ops if op.name == "weight.load"]
        point = {name: start for name, start, _ in weight.indices}
        name = tensor_name(str(loads[0].attrs["tensor"]), point) if len(loads) == 1 else ""
        if name and name not in tensors and {f"{name}_blocks", f"{name}_scales"} <= set(tensors):
            count += _rewrite(weight, loads[0])
    return count


def _rewrite(weight: Weight, load: Op) -> bool:
    """Load, select and transpose of one expert become select of blocks and scales, and their product."""
    ops = weight.program.ops
    at = ops.index(load)
    if [op.name for op in ops[at : at + 3]] != ["weight.load", "weight.select", "weight.transpose"]:
        return False
    shape = load.attrs["shape"]
    assert isinstance(shape, tuple)
    experts, inner, outer = shape
    index = ops[at + 1].operands[1]
    made: list[Op] = []

    def emit(name: str, *operands: Operand, **attrs: object) -> Value:
        (type_,) = infer(OPS[name], operands, dict(attrs), None)
        out = Value(f"m{len(made)}", type_)
        made.append(Op(name, list(operands), dict(attrs), [out], load.loc))  # type: ignore[arg-type]
        return out

    assert isinstance(inner, int)
    groups = -(-inner // BLOCK)
    parts = []
    for suffix, dims in (("blocks", (experts, outer, groups, BLOCK // 2)), ("scales", (experts, outer, groups))):
        whole = emit("weight.load", tensor=f"{load.attrs['tensor']}_{suffix}", shape=dims, dtype="u8")
        parts.append(emit("weight.select", whole, index))
    unpacked = emit("weight.mxfp4", *parts)
    assert isinstance(unpacked.type, TensorType)
    replaced = ops[at + 2].result
    ops[at : at + 3] = made
    replace_values(weight.program, {replaced: unpacked})
    fresh_names(weight.program)
    return True
