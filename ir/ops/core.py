"""Embedding, projections, element-wise ops and rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from moec.ir.dims import Size
from moec.ir.module import Module
from moec.ir.optable import (
    BOOL,
    FLOAT,
    INT,
    Attr,
    Attrs,
    OpDef,
    require,
    same,
    tensor,
)
from moec.ir.types import TensorType, Type

FLOATS = ("f32", "bf16", "f16", "f64")


class Embed(OpDef):
    """Rows of a table: `y[t] = table[ids[t]]`, converted to `dtype`."""

    name = "embed"
    operands = "ids table"
    attrs = {"dtype": Attr("str", choices=FLOATS)}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        ids, table = tensor(t[0], "ids", 1, ("i32",)), tensor(t[1], "table", 2)
        return [TensorType(str(a["dtype"]), (ids.shape[0], table.shape[1]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[1][x[0].long()]]

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        y = tensor(r[0], "y")
        return y.nbytes() + tensor(t[0], "ids").nbytes()


def product_dtype(x: TensorType, w: TensorType, a: Attrs) -> str:
    """Element type of a product; raises TypeRuleError when the operands' scale formats differ."""
    if x.quant and w.quant:
        require(
            x.quant.scale == w.quant.scale,
            f"scale formats differ: x has {x.quant.scale}, w has {w.quant.scale}; re-quantise one of them",
        )
    return str(a.get("out", "bf16" if x.quant else x.dtype))


OUT = Attr("str", optional=True, choices=FLOATS)
GLU = {
    **{key: Attr("float", optional=True) for key in ("limit", "alpha", "shift")},
    "act": Attr("str", optional=True, choices=("gelu", "gelu_tanh", "relu")),
}
"""Attributes of gated activations; see `swiglu`."""


class Linear(OpDef):
    """`y = x · wᵀ (+ bias)` with `w[out, in]`; accumulates in FP32, `out` names another result type."""

    name = "linear"
    operands = "x w bias?"
    attrs = {"out": OUT}
    takes_quantised = True

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, w = tensor(t[0], "x", 2), tensor(t[1], "w", 2)
        same(x.shape[1], w.shape[1], "inner dims of x and w")
        if len(t) == 3:
            same(tensor(t[2], "bias", 1).shape[0], w.shape[0], "bias and rows of w")
        return [TensorType(product_dtype(x, w, a), (x.shape[0], w.shape[0]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        y = ctx.product(x[0], x[1])
        return [y + x[2] if len(x) == 3 else y]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        x, w = tensor(t[0], "x"), tensor(t[1], "w")
        return x.elements() * w.shape[0] * 2


class LinearHeads(OpDef):
    """One product per head: `y[t, h] = w[h] · x[t, h]` with `w[heads, out, in]`.

    With `part = [start, stop, rows]` the weight is a matrix `[heads·rows, columns]` of which a head owns `rows`, and
    `w[h]` are those from `start` to `stop`; `transposed` takes `w[h]ᵀ`.
    """

    name = "linear.heads"
    operands = "x w"
    attrs = {
        "out": OUT,
        "part": Attr("ints", optional=True),
        "transposed": Attr("bool", optional=True),
    }

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, w = tensor(t[0], "x", 3), tensor(t[1], "w", 2 if "part" in a else 3)
        if "part" in a:
            part = tuple(a["part"])
            require(len(part) == 3 and 0 <= part[0] < part[1] <= part[2], f"part {list(part)} is no start, stop, rows")
            same(x.shape[1] * part[2], w.shape[0], "rows of all heads and of w")
        heads, n, k = head_sizes(w, a)
        same(x.shape[1], heads, "heads of x and w")
        same(x.shape[2], k, "inner dims of x and w")
        return [TensorType(product_dtype(x, w, a), (x.shape[0], x.shape[1], n))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        w = x[1]
        if "part" in a:
            start, stop, rows = a["part"]
            w = w.reshape(-1, rows, w.shape[-1])[:, start:stop]
        return [ctx.torch.einsum("thn,hnk->thk" if a.get("transposed") else "thk,hnk->thn", x[0], w)]

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        x, w = tensor(t[0], "x"), tensor(t[1], "w")
        start, stop, rows = (int(n) for n in a.get("part", (0, 1, 1)))
        return x.nbytes() + w.nbytes() * (stop - start) // rows

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements() * head_sizes(tensor(t[1], "w"), a)[1] * 2


def head_sizes(w: TensorType, a: Attrs) -> tuple[Size, Size, Size]:
    """Heads, outputs and inputs of each head's product, from the weight of a `linear.heads` and its attributes."""
    n, k = w.shape[-2:]
    heads = w.shape[0]
    if "part" in a:
        start, stop, rows = a["part"]
        heads, n = heads // rows, stop - start
    return (heads, k, n) if a.get("transposed") else (heads, n, k)


class Add(OpDef):
    """Element-wise sum of equal types."""

    name = "add"
    operands = "a b"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = tensor(t[0], "a", dtypes=FLOATS)
        require(t[1] == x, f"a and b differ: {x} and {t[1]}")
        return [x]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[0] + x[1]]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "a").elements()


class SwiGlu(OpDef):
    """Gated activation (Shazeer 2020): `y = silu(x[:, :n]) · x[:, n:]` for `x[T, 2n]`.

    Variants of gpt-oss (2508.10925): with `limit` the gate is cut above it and the other half to ±limit; `alpha` scales
    the gate within the sigmoid; `shift` is added to the other half. `act` names the gate's function where it
    is not silu: `gelu` (Hendrycks and Gimpel 2016, 1606.08415), its approximation `gelu_tanh`, or `relu`.
    """

    name = "swiglu"
    operands = "x"
    attrs = GLU

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = tensor(t[0], "x", 2, FLOATS)
        width = x.shape[1]
        require(isinstance(width, int) and width % 2 == 0, f"width of x must be even, got {width}")
        check_glu(a)
        return [TensorType(x.dtype, (x.shape[0], width // 2))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [swiglu(x[0], ctx.torch, a)]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(r[0], "y").elements() * 5


def check_glu(a: Attrs) -> None:
    """Raise TypeRuleError for a limit that cuts everything, or an `alpha` of another function than silu."""
    require(not ("act" in a and "alpha" in a), "alpha scales the gate of silu: leave act or alpha away")
    require(float(a.get("limit", 1.0)) > 0, f"limit must be above 0, got {a.get('limit')}")


def swiglu(x: Any, torch: Any, a: Attrs | None = None) -> Any:
    """SwiGLU of a torch tensor whose last dim holds gate and up; `a`: attributes as of `swiglu`."""
    a = a or {}
    gate, up = x.chunk(2, -1)
    if "limit" in a:
        gate, up = gate.clamp(max=a["limit"]), up.clamp(-a["limit"], a["limit"])
    up = up + a.get("shift", 0.0)
    if "act" not in a:
        return gate * (gate * a.get("alpha", 1.0)).sigmoid() * up
    if a["act"] == "relu":
        return gate.relu() * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if a["act"] == "gelu_tanh" else "none") * up


class Scale(OpDef):
    """Every element times a constant."""

    name = "scale"
    operands = "x"
    attrs = {"factor": FLOAT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        return [tensor(t[0], "x", 2, FLOATS)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[0] * a["factor"]]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements()


class Clamp(OpDef):
    """Every element cut to ±limit."""

    name = "clamp"
    operands = "x"
    attrs = {"limit": FLOAT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        require(float(a["limit"]) > 0, f"limit must be above 0, got {a['limit']}")
        return [tensor(t[0], "x", 2, FLOATS)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[0].clamp(-a["limit"], a["limit"])]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements() * 2


class TensorPointwise(OpDef):
    """A function of each element that nothing more special takes in: what an import leaves as it is."""

    name = "tensor.pointwise"
    operands = "x"
    attrs = {"function": Attr("str", choices=("exp", "gelu", "relu", "sigmoid", "silu", "tanh"))}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        return [tensor(t[0], "x", dtypes=FLOATS)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        name = str(a["function"])
        functional = ctx.torch.nn.functional
        return [(getattr(functional, name) if name in ("gelu", "silu") else getattr(ctx.torch, name))(x[0])]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements() * 4


class GateRows(OpDef):
    """Rows times the sigmoid of a number of their own: `y[t] = sigmoid(g[t, 0]) · x[t]`."""

    name = "gate.rows"
    operands = "x g"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, g = tensor(t[0], "x", 2, FLOATS), tensor(t[1], "g", 2, FLOATS)
        same(x.shape[0], g.shape[0], "rows of x and g")
        same(g.shape[1], 1, "width of g and one")
        return [x]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[0] * x[1].sigmoid()]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements()


class Rope(OpDef):
    """Rotary embedding (Su et al. 2021) of dims `offset..offset+dims` of the last axis, other dims unchanged.

    `table[positions, dims]` holds cosines, then sines, of dims/2 angles. Pairs are (2i, 2i+1) when interleaved,
    else (i, i + dims/2).
    """

    name = "rope"
    operands = "x pos table"
    attrs = {"offset": INT, "dims": INT, "interleaved": BOOL}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, pos, table = (
            tensor(t[0], "x", dtypes=FLOATS),
            tensor(t[1], "pos", 1, ("i32",)),
            tensor(t[2], "table", 2),
        )
        offset, dims = int(a["offset"]), int(a["dims"])
        width = x.shape[-1]
        require(dims > 0 and dims % 2 == 0, f"rope dims must be even and positive, got {dims}")
        require(
            isinstance(width, int) and offset >= 0 and offset + dims <= width,
            f"rope dims {offset}..{offset + dims} leave the width {width}",
        )
        same(x.shape[0], pos.shape[0], "tokens of x and pos")
        same(table.shape[1], dims, "table width and dims")
        return [x]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        torch = ctx.torch
        offset, dims = int(a["offset"]), int(a["dims"])
        rows = x[2][x[1].long()].reshape(-1, *[1] * (x[0].ndim - 2), dims)
        cos, sin = rows.chunk(2, -1)
        part = x[0][..., offset : offset + dims]
        if a["interleaved"]:
            u, v = part[..., 0::2], part[..., 1::2]
            turned = torch.stack((u * cos - v * sin, v * cos + u * sin), -1).flatten(-2)
        else:
            u, v = part.chunk(2, -1)
            turned = torch.cat((u * cos - v * sin, v * cos + u * sin), -1)
        return [torch.cat((x[0][..., :offset], turned, x[0][..., offset + dims :]), -1)]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        x = tensor(t[0], "x")
        return prod(x.shape[:-1], start=3) * int(a["dims"])

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        x, pos = tensor(t[0], "x"), tensor(t[1], "pos")
        return x.nbytes() + pos.shape[0] * int(a["dims"]) * 4
