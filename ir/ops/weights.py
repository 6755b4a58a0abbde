"""What a weight program does with the tensors of a checkpoint: parts, joins, shapes, number formats, packing.

A program runs once per point of its weight's index ranges; `weight_sources` holds the ops it begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd, prod
from typing import Any

from moec.ir.lane16 import FORMATS
from moec.ir.module import Module
from moec.ir.ops.core import FLOATS
from moec.ir.ops.quant import QUANT_ATTRS, parse_block, quantised
from moec.ir.ops.weight_sources import ints
from moec.ir.optable import INT, INTS, Attr, Attrs, OpDef, index, known, require, tensor
from moec.ir.types import Quant, TensorType, Type

LAYOUTS = ("lane16",)


class WeightMxfp4(OpDef):
    """Unpack MXFP4 (OCP MX specification): two E2M1 elements a byte, the low bits first, times 2^(scale - 127).

    `blocks[out, groups, 16]` and `scales[out, groups]` of u8 give `[out, groups · 32]`, exact in BF16.
    """

    name = "weight.mxfp4"
    operands = "blocks scales"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        blocks, scales = tensor(t[0], "blocks", 3, ("u8",)), tensor(t[1], "scales", 2, ("u8",))
        require(blocks.shape[:2] == scales.shape, f"blocks and scales differ: {blocks} and {scales}")
        require(blocks.shape[2] == 16, f"a block has 16 bytes, got {blocks}")
        return [TensorType("bf16", (blocks.shape[0], blocks.shape[1] * 32))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        torch = ctx.torch
        values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        table = torch.tensor(values + [-v for v in values])
        halves = torch.stack((x[0] & 15, x[0] >> 4), -1).flatten(-2)
        scaled = torch.ldexp(table[halves.long()], x[1].int()[..., None] - 127)
        return [scaled.flatten(-2).to(torch.bfloat16)]


class WeightSelect(OpDef):
    """One entry of the leading dim, by an index of the weight: the expert of a stacked tensor."""

    name = "weight.select"
    operands = "x i"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = _plain(t[0])
        index(t[1], "i")
        require(len(x.shape) >= 2, f"x must have at least 2 dims, got {x}")
        return [x.with_shape(*x.shape[1:])]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[0][x[1]]]


class WeightConcat(OpDef):
    """Join parts along `axis`; quantised parts keep their scales, with finer blocks where a part ends inside one.

    Parts without scales may differ in their element type: the result is then FP32.
    """

    name = "weight.concat"
    operands = "parts*"
    attrs = {"axis": INT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        require(len(t) >= 1, "weight.concat needs at least one part")
        parts = [tensor(p, "part") for p in t]
        axis, first = int(a["axis"]), parts[0]
        require(0 <= axis < len(first.shape), f"axis {axis} is out of range for {first}")
        mixed = len({p.dtype for p in parts}) > 1 and all(p.dtype in FLOATS and p.quant is None for p in parts)
        first = replace(first, dtype="f32") if mixed else first
        for p in parts[1:]:
            alike = mixed or (p.dtype == first.dtype and p.quant == first.quant)
            agree = alike and len(p.shape) == len(first.shape)
            rest = agree and all(i == axis or d == e for i, (d, e) in enumerate(zip(p.shape, first.shape, strict=True)))
            require(rest, f"parts do not fit: {first} and {p}")
        sizes = [known(p.shape[axis], "size of a part") for p in parts]
        shape = (*first.shape[:axis], sum(sizes), *first.shape[axis + 1 :])
        return [replace(first, shape=shape, quant=concat_quant(first, axis, sizes))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        from moec.ir.numeric import Quantised, concat_quantised

        if isinstance(x[0], Quantised):
            return [concat_quantised(list(x), int(a["axis"]))]
        if len({part.dtype for part in x}) > 1:
            x = [part.to(ctx.torch.promote_types(part.dtype, ctx.torch.float32)) for part in x]
        return [ctx.torch.cat(list(x), int(a["axis"]))]


def concat_quant(first: TensorType, axis: int, sizes: Sequence[int]) -> Quant | None:
    """Quantisation of a concatenation: the block along `axis` shrinks to what divides every inner boundary."""
    if first.quant is None:
        return None
    lead = len(first.shape) - len(first.quant.block)
    if axis < lead:
        return first.quant
    block = list(first.quant.block)
    # gcd(0, n) = n: a scale that spanned its part now spans a block.
    block[axis - lead] = gcd(block[axis - lead], *sizes[:-1])
    return Quant(first.quant.scale, tuple(block))


class WeightSlice(OpDef):
    """Part `start..stop` of dim `axis`; quantised data keep their scales, in finer blocks where it begins in one."""

    name = "weight.slice"
    operands = "x"
    attrs = {"axis": INT, "start": INT, "stop": INT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = _unpacked(t[0])
        axis, start, stop = int(a["axis"]), int(a["start"]), int(a["stop"])
        require(0 <= axis < len(x.shape), f"axis {axis} is out of range for {x}")
        size = x.shape[axis]
        require(isinstance(size, int) and 0 <= start < stop <= size, f"slice {start}..{stop} leaves 0..{size}")
        shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
        return [replace(x.with_shape(*shape), quant=finer(x, axis, start))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        start, stop = int(a["start"]), int(a["stop"])
        # Quantised has the same method.
        return [x[0].narrow(int(a["axis"]), start, stop - start)]


def finer(x: TensorType, axis: int, boundary: int) -> Quant | None:
    """The quantisation of `x` with blocks along `axis` that also end at `boundary`."""
    if x.quant is None:
        return None
    at = axis - (len(x.shape) - len(x.quant.block))
    if at < 0 or x.quant.block[at] == 0:
        return x.quant
    block = list(x.quant.block)
    block[at] = gcd(block[at], boundary)
    return Quant(x.quant.scale, tuple(block))


def _unpacked(t: Type) -> TensorType:
    x = tensor(t, "x")
    require(x.layout is None, f"x must be unpacked, got {x}")
    return x


def _plain(t: Type) -> TensorType:
    x = tensor(t, "x")
    require(x.quant is None and x.layout is None, f"x must be unquantised and unpacked, got {x}")
    return x


class WeightReshape(OpDef):
    """The same elements in another shape; of quantised data, rows `[a·b, K]` as `[a, b, K]` in blocks that divide b."""

    name = "weight.reshape"
    operands = "x"
    attrs = {"shape": INTS}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, shape = _unpacked(t[0]), ints(a, "shape")
        require(prod(shape) == x.elements(), f"{x} does not reshape to {list(shape)}")
        if x.quant is None:
            return [x.with_shape(*shape)]
        rows = len(x.shape) == len(x.quant.block) == 2 and len(shape) == 3 and shape[2] == x.shape[1]
        require(rows, f"{x} is quantised: only its rows can be divided, not {list(shape)}")
        return [replace(x.with_shape(*shape), quant=finer(x, 0, shape[1]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        shape = ints(a, "shape")
        return [x[0].reshape(shape) if isinstance(x[0], ctx.torch.Tensor) else x[0].divide_rows(shape)]


class WeightTranspose(OpDef):
    """Permuted dims."""

    name = "weight.transpose"
    operands = "x"
    attrs = {"perm": INTS}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, perm = _unpacked(t[0]), ints(a, "perm")
        require(sorted(perm) == list(range(len(x.shape))), f"perm {list(perm)} does not permute the dims of {x}")
        out = x.with_shape(*(x.shape[p] for p in perm))
        if x.quant is None:
            return [out]
        lead = len(x.shape) - len(x.quant.block)
        require(perm[:lead] == tuple(range(lead)), f"perm {list(perm)} moves dims out of the scale blocks of {x}")
        return [replace(out, quant=Quant(x.quant.scale, tuple(x.quant.block[p - lead] for p in perm[lead:])))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[0].permute(ints(a, "perm"))]


class WeightMatmul(OpDef):
    """Products of stacked matrices, `[..., n, k] · [..., k, m]`, in FP32: two projections made one ahead of time."""

    name = "weight.matmul"
    operands = "x y"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, y = _plain(t[0]), _plain(t[1])
        require(len(x.shape) == len(y.shape) >= 2, f"x and y must be stacks of matrices, got {x} and {y}")
        require(x.shape[:-2] == y.shape[:-2], f"stacks differ: {x} and {y}")
        require(x.shape[-1] == y.shape[-2], f"inner dims differ: {x} and {y}")
        return [TensorType("f32", (*x.shape[:-1], y.shape[-1]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        wide = ctx.torch.promote_types(x[0].dtype, ctx.torch.float32)
        return [x[0].to(wide) @ x[1].to(wide)]


class WeightCast(OpDef):
    """Round to another unscaled element type."""

    name = "weight.cast"
    operands = "x"
    attrs = {"dtype": Attr("str", choices=FLOATS)}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        return [_plain(t[0]).with_dtype(str(a["dtype"]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        from moec.ir.numeric import torch_dtype

        return [x[0].to(torch_dtype(str(a["dtype"])))]


class WeightDequant(OpDef):
    """Multiply a quantised tensor by its scales; with `weight.quantise` behind it, a re-quantisation."""

    name = "weight.dequant"
    operands = "x"
    attrs = {"dtype": Attr("str", choices=FLOATS)}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = tensor(t[0], "x")
        require(x.quant is not None and x.layout is None, f"x must be quantised and unpacked, got {x}")
        return [x.with_dtype(str(a["dtype"]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        from moec.ir.numeric import torch_dtype

        return [x[0].dequantise(torch_dtype(str(a["dtype"])))]


class WeightQuantise(OpDef):
    """Quantise with one scale per block of the trailing dims."""

    name = "weight.quantise"
    operands = "x"
    attrs = QUANT_ATTRS

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        return [quantised(_plain(t[0]), a)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        from moec.ir.numeric import quantise

        return [quantise(x[0], str(a["dtype"]), parse_block(str(a["granularity"])), str(a["scale"]))]


def packable(x: TensorType) -> bool:
    """Whether `lane16` can store the scales of a matrix: constant over each 128 columns of a row."""
    if x.quant is None:
        return True
    columns = x.quant.block[-1]
    width = known(x.shape[-1], "width")
    return len(x.quant.block) == 2 and (columns % 128 == 0 or columns >= width)


class WeightPack(OpDef):
    """Store matrices in a kernel's layout. `lane16`: tiles of 16 rows whose 4-byte lanes hold consecutive columns."""

    name = "weight.pack"
    operands = "x"
    attrs = {"layout": Attr("str", choices=LAYOUTS)}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = tensor(t[0], "x")
        require(
            x.layout is None and len(x.shape) >= 2,
            f"x must be an unpacked matrix or stack of matrices, got {x}",
        )
        require(x.dtype in FORMATS, f"layout {a['layout']} stores {', '.join(FORMATS)}, got {x.dtype}")
        if x.quant and FORMATS[x.dtype].scale_dtype == "uint8":
            require(
                x.quant == Quant("ue8m0", (1, 32)),
                f"layout {a['layout']} stores {x.dtype} with scale(ue8m0, 1x32), got {x.quant}",
            )
        else:
            require(
                packable(x),
                f"layout {a['layout']} has a scale for each 128 columns: the blocks of {x} do not follow them",
            )
        return [replace(x, layout=str(a["layout"]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        from moec.ir.numeric import Packed

        return [Packed(x[0])]
