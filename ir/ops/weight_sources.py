"""Where a weight program begins: tensors of the checkpoint, and tables that are computed.

`{l}` and `{e}` in a tensor's name stand for the indices of the point. Where several layers make up one turn of a
`repeat`, `{l*2+1}` names one of them. Nothing is read before the packer or the reference evaluator runs the program.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moec.ir.module import Module
from moec.ir.ops.quant import parse_block
from moec.ir.optable import FLOAT, INT, INTS, STR, Attr, Attrs, OpDef, require
from moec.ir.types import BITS, QUANTISED, SCALE_BITS, Quant, TensorType, Type

_INDEX = re.compile(r"\{([a-z]+)(?:\*(\d+))?(?:\+(\d+))?\}")


def tensor_name(template: str, point: Mapping[str, int]) -> str:
    """The checkpoint's name of a tensor at an index point: `{l}` and `{l*2+1}` are filled in."""
    return _INDEX.sub(lambda m: str(point[m[1]] * int(m[2] or 1) + int(m[3] or 0)) if m[1] in point else m[0], template)


def name_indices(template: str) -> frozenset[str]:
    """The indices that a tensor's name depends on."""
    return frozenset(m[1] for m in _INDEX.finditer(template))


def ints(a: Attrs, key: str) -> tuple[int, ...]:
    """An attribute that is a list of integers."""
    return tuple(a[key])


class WeightLoad(OpDef):
    """Read one tensor of the checkpoint, whose shape and element type must be as stated."""

    name = "weight.load"
    attrs = {"tensor": STR, "shape": INTS, "dtype": Attr("str", choices=tuple(BITS))}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        return [TensorType(str(a["dtype"]), ints(a, "shape"))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [ctx.load(str(a["tensor"]), ints(a, "shape"), str(a["dtype"]))]


class WeightLoadScaled(OpDef):
    """Read a block-scaled FP8 tensor and its scales (`*.weight_scale_inv`), kept as they are."""

    name = "weight.load_scaled"
    attrs = {
        "tensor": STR,
        "scales": STR,
        "shape": INTS,
        "dtype": Attr("str", choices=QUANTISED),
        "granularity": STR,
        "scale": Attr("str", optional=True, choices=tuple(SCALE_BITS)),
    }

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        block = parse_block(str(a["granularity"]))
        require(
            len(block) == len(ints(a, "shape")),
            f"granularity {a['granularity']} does not fit the shape {list(ints(a, 'shape'))}",
        )
        return [TensorType(str(a["dtype"]), ints(a, "shape"), Quant(str(a.get("scale", "f32")), block))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        from moec.ir.numeric import Quantised

        shape, block = ints(a, "shape"), parse_block(str(a["granularity"]))
        blocks = tuple(-(-d // b) if b else 1 for d, b in zip(shape, block, strict=True))
        data = ctx.load(str(a["tensor"]), shape, str(a["dtype"]))
        scales = ctx.load(str(a["scales"]), blocks, "f32").float()
        return [Quantised(data, scales, str(a["dtype"]), block, str(a.get("scale", "f32")))]


class WeightRopeTable(OpDef):
    """Cosines and sines of rotary angles for `positions` positions, `[positions, cos(dims/2) | sin(dims/2)]`.

    With `factor` above 1 the frequencies are YaRN's (Peng et al. 2023, arXiv 2309.00071): interpolated below
    `beta_slow` turns over the `original` context, kept above `beta_fast`, blended between; `attention` scales cosines
    and sines. Other `method`s: `linear` divides by `factor` (Chen et al. 2023, 2306.15595); `llama3` keeps more than
    `beta_fast` turns, divides less than `beta_slow`, and blends between (Llama 3.1, 2407.21783); `factors` divides each
    frequency by a number of its own (LongRoPE, 2402.13753), by `short_factors` where there are no more positions than
    the `original` context, and scales by `short_attention` then.
    """

    name = "weight.rope_table"
    attrs = {
        "positions": INT,
        "dims": INT,
        "theta": FLOAT,
        "factor": FLOAT,
        "original": INT,
        "beta_fast": FLOAT,
        "beta_slow": FLOAT,
        "attention": FLOAT,
        "truncate": Attr("bool"),
        "method": Attr("str", optional=True, choices=("yarn", "linear", "llama3", "factors")),
        "factors": Attr("floats", optional=True),
        "short_factors": Attr("floats", optional=True),
        "short_attention": Attr("float", optional=True),
    }

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        dims = int(a["dims"])
        require(dims > 0 and dims % 2 == 0, f"rope dims must be even and positive, got {dims}")
        if a.get("method") == "factors":
            for key in ("factors", "short_factors"):
                given = len(a.get(key, ()))
                require(given == dims // 2, f"{dims // 2} {key} are needed for {dims} dims, got {given}")
        return [TensorType("f32", (int(a["positions"]), dims))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        from moec.ir.numeric import rope_table

        return [rope_table(**a)]


class WeightTemperatureTable(OpDef):
    """A rotary table that turns by no angle and scales: `1 + scale · log(1 + floor((p + 1) / floor))` at position p.

    Attention temperature that grows with the position (Nakanishi 2025, arXiv 2501.19399), applied by `rope`.
    """

    name = "weight.temperature_table"
    attrs = {"positions": INT, "dims": INT, "floor": FLOAT, "scale": FLOAT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        dims = int(a["dims"])
        require(dims > 0 and dims % 2 == 0, f"dims must be even and positive, got {dims}")
        require(float(a["floor"]) > 0, f"floor must be above 0, got {a['floor']}")
        return [TensorType("f32", (int(a["positions"]), dims))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        torch = ctx.torch
        steps = ((torch.arange(a["positions"], dtype=torch.float32) + 1) / a["floor"]).floor()
        cos = (steps.log1p() * a["scale"] + 1)[:, None].expand(-1, a["dims"] // 2)
        return [torch.cat((cos, torch.zeros_like(cos)), -1)]


class WeightFill(OpDef):
    """A tensor of one value: the weight of a norm that has none."""

    name = "weight.fill"
    attrs = {"shape": INTS, "value": FLOAT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        return [TensorType("f32", ints(a, "shape"))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [ctx.torch.full(ints(a, "shape"), a["value"])]
