"""Weight programs of one rank of a mesh: its part of a tensor, its experts. What a rank does not hold is not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moec.ir.module import Module
from moec.ir.ops.collective import AXIS, GROUP
from moec.ir.optable import INT, Attr, Attrs, OpDef, index, known, require, tensor
from moec.ir.types import IndexType, Type


class WeightShard(OpDef):
    """This rank's part of dim `dim`, one of `ranks` equal ones; of `parts` joined tensors (gate | up) a part of each.

    With `copies` there are `ranks / copies` parts, and so many consecutive ranks have the same one. Scale blocks of
    quantised tensors must not be cut.
    """

    name = "weight.shard"
    operands = "x"
    attrs = {**GROUP, "dim": INT, "parts": Attr("int", optional=True), "copies": Attr("int", optional=True)}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, at, ranks = tensor(t[0], "x"), int(a["dim"]), int(a["ranks"])
        parts, copies = int(a.get("parts", 1)), int(a.get("copies", 1))
        require(copies >= 1 and ranks % copies == 0, f"{copies} copies do not divide {ranks} ranks")
        n = ranks // copies
        require(x.layout is None, f"x must be unpacked, got {x}")
        require(0 <= at < len(x.shape), f"dim {at} is out of range for {x}")
        require(n >= 1 and parts >= 1, f"ranks and parts must be at least 1, got {n} and {parts}")
        size = known(x.shape[at], "size of the dim that is cut")
        require(size % (n * parts) == 0, f"{size} does not divide into {parts} x {n} parts")
        lead = len(x.shape) - len(x.quant.block) if x.quant else 0
        if x.quant is not None and at >= lead:
            block, each = x.quant.block[at - lead], size // (n * parts)
            require(block > 0 and each % block == 0, f"a part of {each} cuts the scale blocks of {block}")
        axes = list(x.sharding or [None] * len(x.shape))
        axes[at] = str(a["axis"])
        return [replace(x, shape=(*x.shape[:at], size // n, *x.shape[at + 1 :]), sharding=tuple(axes))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        from moec.ir.numeric import shard

        copies = int(a.get("copies", 1))
        index = ctx.coordinate(str(a["axis"])) // copies
        return [shard(x[0], int(a["dim"]), int(a["ranks"]) // copies, int(a.get("parts", 1)), index)]


class WeightOnce(OpDef):
    """The tensor on the first rank of an axis and zeros on the others: a bias that a sum over ranks adds once."""

    name = "weight.once"
    operands = "x"
    attrs = {"axis": AXIS}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = tensor(t[0], "x")
        require(x.quant is None and x.layout is None, f"x must be unquantised and unpacked, got {x}")
        return [x]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[0] if ctx.coordinate(str(a["axis"])) == 0 else x[0] * 0]


class WeightPad(OpDef):
    """Zeros behind dim `dim` of each of `parts` joined tensors, up to `size` for one: room for whole scale blocks."""

    name = "weight.pad"
    operands = "x"
    attrs = {"dim": INT, "size": INT, "parts": Attr("int", optional=True)}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, at, parts = tensor(t[0], "x"), int(a["dim"]), int(a.get("parts", 1))
        require(x.quant is None and x.layout is None, f"x must be unquantised and unpacked, got {x}")
        require(0 <= at < len(x.shape), f"dim {at} is out of range for {x}")
        old = known(x.shape[at], "size of the dim that is padded")
        require(parts >= 1 and old % parts == 0, f"{old} does not divide into {parts} parts")
        require(int(a["size"]) >= old // parts, f"size {a['size']} is below the {old // parts} of a part")
        return [replace(x, shape=(*x.shape[:at], int(a["size"]) * parts, *x.shape[at + 1 :]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        at, wanted = int(a["dim"]), int(a["size"])
        padded = []
        for piece in x[0].chunk(int(a.get("parts", 1)), at):
            shape = list(piece.shape)
            shape[at] = wanted - shape[at]
            padded.append(ctx.torch.cat((piece, piece.new_zeros(shape)), at))
        return [ctx.torch.cat(padded, at)]


class WeightSlot(OpDef):
    """From here on `{e}` in tensor names is the expert that this rank's slot `e` holds in layer `l`.

    `slots` in all, `slots / ranks` on each rank of the axis in turn; which expert stands in which says the module's
    attribute `placement`, or without one slot s holds expert s mod `experts`. `first` is the first layer with experts.
    """

    name = "weight.slot"
    operands = "l e"
    attrs = {**GROUP, "slots": INT, "experts": INT, "first": INT}
    results = "expert"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        index(t[0])
        index(t[1], "slot")
        slots, n = int(a["slots"]), int(a["ranks"])
        require(n >= 1 and slots % n == 0, f"{slots} slots do not divide over {n} ranks")
        require(1 <= int(a["experts"]) <= slots, f"{a['experts']} experts need at least as many slots, got {slots}")
        return [IndexType()]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        each = int(a["slots"]) // int(a["ranks"])
        slot = ctx.coordinate(str(a["axis"])) * each + int(x[1])
        expert = ctx.replicas(int(x[0]) - int(a["first"]), int(a["experts"]), int(a["slots"])).experts_of[slot]
        ctx.stand_for("e", expert)
        return [expert]
