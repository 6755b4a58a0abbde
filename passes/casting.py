"""What a weight's program needs to give it an element type: quantising, widening, scales that kernels follow."""

from __future__ import annotations

from dataclasses import replace

from moec.ir import TensorType, Weight
from moec.ir.ops.weights import packable
from moec.ir.rewrite import append_to_program
from moec.ir.types import Quant
from moec.passes import recipe as recipes
from moec.passes.recipe import Element

COLUMNS = 128
"""Columns of a row that share a scale in the layout of CPU kernels and in GPU products."""
SECOND = "a second rounding, measured when it is packed"


def cast(weight: Weight, to: Element, keep: bool = False) -> str:
    """Append to a weight's program what gives it type `to`; says when a checkpoint's own quantisation is lost by it.

    With `keep` a scaled weight of the right element type stays as the checkpoint holds it.
    """
    has = weight.type
    assert isinstance(has, TensorType)
    if to.dtype == recipes.KEPT:
        return ""
    if has.quant is None:
        if to.quant is not None:
            quantise(weight, to)
        elif has.dtype != to.dtype:
            append_to_program(weight, "weight.cast", dtype=to.dtype)
        return ""
    if to.quant is None:
        append_to_program(weight, "weight.dequant", dtype=to.dtype)
        return ""
    if has.dtype == to.dtype and (keep or (has.quant.scale == to.quant.scale and _as_fine(has.quant, to.quant))):
        return ""
    append_to_program(weight, "weight.dequant", dtype="f32")
    quantise(weight, to)
    return f"re-quantised from {Element(has.dtype, has.quant)} to {to}, {SECOND}"


def follow_columns(weight: Weight) -> str:
    """Quantise a weight again whose scale blocks the CPU's layout cannot hold, as slices that begin inside a block.

    One that the recipe quantises gets blocks of a row's columns at once.
    """
    has = weight.type
    assert isinstance(has, TensorType)
    if has.dtype != "fp8_e4m3" or has.quant is None or packable(has):
        return ""
    to = Element(has.dtype, Quant(has.quant.scale, (1, COLUMNS)))
    last = weight.program.ops[-1]
    if last.name == "weight.quantise" and not _quantised_before(weight):
        last.attrs["granularity"] = to.granularity
        weight.type = last.result.type = replace(has, quant=to.quant)
        return f"{has.quant} does not follow the kernel's {COLUMNS} columns: quantised to {to.quant} instead"
    append_to_program(weight, "weight.dequant", dtype="f32")
    quantise(weight, to)
    return f"{has.quant} does not follow the kernel's {COLUMNS} columns: re-quantised to {to.quant}, {SECOND}"


def widen_cut_blocks(weight: Weight) -> str:
    """Hold slices by head in BF16 where the checkpoint's blocks, cut by them, are no 128 columns that a GPU sums."""
    has = weight.type
    assert isinstance(has, TensorType)
    if has.quant is None or has.quant.block[-1] == COLUMNS:
        return ""
    append_to_program(weight, "weight.dequant", dtype="bf16")
    return f"{has.quant} does not follow {COLUMNS} columns: held in BF16"


def quantise(weight: Weight, to: Element) -> None:
    """Append the quantisation of a weight that has none."""
    assert to.quant is not None
    append_to_program(weight, "weight.quantise", dtype=to.dtype, granularity=to.granularity, scale=to.quant.scale)


def _as_fine(has: Quant, wanted: Quant) -> bool:
    """Whether every block of `has` lies in one of `wanted`: scales of parts and slices are kept as they are."""
    pairs = zip(has.block, wanted.block, strict=True) if len(has.block) == len(wanted.block) else None
    return pairs is not None and all(w == 0 or (h != 0 and w % h == 0) for h, w in pairs)


def _quantised_before(weight: Weight) -> bool:
    """Whether a program reads quantised values that its last op quantises again."""
    return any(op.name == "weight.dequant" for op in weight.program.ops)
