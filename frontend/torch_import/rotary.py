"""Patterns of rotary embeddings over nodes of an exported graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from moec.frontend.torch_import.exported import shape
from moec.frontend.torch_import.patterns import joined, op, pair, part, same, unview


@dataclass(frozen=True)
class Turned:
    """A rotary embedding of the `dims` elements of each head from `offset` on.

    Pairs are i and i + dims/2, or side by side (`interleaved`).
    """

    x: Node
    cos: Node
    dims: int
    offset: int = 0
    interleaved: bool = False


def rope(node: Any) -> Turned | None:
    """`x · cos + rotate_half(x) · sin`, or a complex product; of whole heads, or of a part joined with the rest.

    Where a graph sorts pairs that lie side by side before it turns them, the result is taken as turned in place:
    queries and keys are sorted alike, so that their products are the same.
    """
    node = same(node)
    if op(node).startswith(("cat", "new_empty")):
        parts = joined(node)
        return (_leading(parts) or _trailing(parts) or _by_halves(parts)) if len(parts) == 2 else None
    if op(node).startswith(("flatten", "reshape", "view.")):
        return _complex(node)
    both = pair(node, "add.Tensor")
    left, right = (pair(both[0], "mul.Tensor"), pair(both[1], "mul.Tensor")) if both else (None, None)
    if left is None or right is None:
        return None
    x, cos = left
    half = _rotated_half(right[0])
    if half is not None and half is x:
        source = _sorted_pairs(x)
        return Turned(source or x, cos, int(shape(x)[-1]), interleaved=source is not None)
    if _rotated_pairs(right[0]) is x:
        return Turned(x, cos, int(shape(x)[-1]), interleaved=True)
    return None


def _leading(parts: list[Any]) -> Turned | None:
    turned = rope(parts[0])
    if turned is None or not op(parts[1]).startswith("slice"):
        return None
    whole = same(parts[1].args[0])
    lead = same(turned.x.args[0]) if op(turned.x).startswith("slice") else turned.x
    return replace(turned, x=whole) if lead is whole and parts[1].args[2] == turned.dims else None


def _trailing(parts: list[Any]) -> Turned | None:
    """The second part of a split turned, the first as it is."""
    first, turned = part(parts[0], 0), rope(parts[1])
    if first is None or turned is None or part(unview(turned.x), 1) is not first:
        return None
    return replace(turned, x=same(first.args[0]), offset=int(shape(parts[0])[-1]))


def _rotated_half(node: Any) -> Node | None:
    node = same(node)
    if not op(node).startswith("cat") or len(node.args[0]) != 2:
        return None
    negative, first = same(node.args[0][0]), same(node.args[0][1])
    if not op(negative).startswith("neg") or not op(first).startswith("slice"):
        return None
    second = same(negative.args[0])
    x = same(first.args[0])
    if op(second).startswith("slice") and same(second.args[0]) is x and second.args[2] * 2 == shape(x)[-1]:
        return x  # type: ignore[no-any-return]
    return None


def _sorted_pairs(node: Any) -> Any:
    """`x` of `x.view(..., d/2, 2).transpose(-1, -2).reshape(..., d)`."""
    if not op(node).startswith(("reshape", "view.")):
        return None
    turned = same(node.args[0])
    if not op(turned).startswith("transpose"):
        return None
    rank = len(shape(turned))
    if {int(d) % rank for d in turned.args[1:3]} != {rank - 1, rank - 2}:
        return None
    pairs = same(turned.args[0])
    apart = op(pairs).startswith(("reshape", "view.")) and shape(pairs)[-1] == 2
    return same(pairs.args[0]) if apart else None


def _rotated_pairs(node: Any) -> Any:
    """`x` of `stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)`."""
    node = same(node)
    stacked: Any = same(node.args[0]) if op(node).startswith(("flatten", "reshape", "view.")) else None
    if not op(stacked).startswith("stack") or len(stacked.args[0]) != 2:
        return None
    negative, even = (same(n) for n in stacked.args[0])
    odd = _every_second(negative.args[0], 1) if op(negative).startswith("neg") else None
    return odd if _every_second(even, 0) is odd else None


def _complex(node: Any) -> Turned | None:
    """`view_as_real(view_as_complex(x.reshape(..., d/2, 2)) · angles).flatten(-2)`."""
    real = same(node.args[0])
    both = pair(real.args[0], "mul.Tensor") if op(real).startswith("view_as_real") else None
    for numbers, angles in (both, both[::-1]) if both else ():
        if op(numbers).startswith("view_as_complex"):
            x = same(same(numbers.args[0]).args[0])
            return Turned(x, angles, int(shape(node)[-1]), interleaved=True)
    return None


def _by_halves(parts: list[Any]) -> Turned | None:
    """`cat(a · cos - b · sin, b · cos + a · sin)` of the halves a, b of a head, or of its even and odd elements."""
    minus, plus = pair(parts[0], "sub.Tensor"), pair(parts[1], "add.Tensor")
    if minus is None or plus is None:
        return None
    products = [pair(n, "mul.Tensor") for n in (*minus, *plus)]
    if None in products:
        return None
    (a, cos), (b, sin), *crossed = products  # type: ignore[misc]
    if [tuple(p) for p in crossed] != [(b, cos), (a, sin)]:  # type: ignore[arg-type]
        return None
    halves = part(a, 0)
    if halves is not None and part(b, 1) is halves:
        whole = same(halves.args[0])
        return Turned(whole, cos, int(shape(whole)[-1]))
    x = _every_second(a, 0)
    return Turned(x, cos, int(shape(x)[-1]), interleaved=True) if x is not None and _every_second(b, 1) is x else None


def _every_second(node: Any, start: int) -> Any:
    """`x` of `x[..., start::2]`."""
    node = same(node)
    in_steps = op(node).startswith("slice") and len(node.args) == 5 and node.args[2:5:2] == (start, 2)
    return same(node.args[0]) if in_steps else None


@dataclass(frozen=True)
class Tempered:
    """Heads times a factor that grows with the position: see `weight.temperature_table`."""

    x: Node
    factor: Node
    floor: float
    scale: float


def tempered(node: Any) -> Tempered | None:
    """`x · (log1p(floor((pos + 1) / floor)) · scale + 1)`, by its form; what `pos` is, the caller looks at."""
    both = pair(node, "mul.Tensor")
    if both is None or not op(both[1]).startswith(("expand", "view")):
        return None
    factor = unview(both[1].args[0]) if op(both[1]).startswith("expand") else unview(both[1])
    numbers = []
    for name in ("add.Tensor", "mul.Tensor", "log1p", "floor.", "div.Tensor", "add.Tensor"):
        if not op(factor).startswith(name):
            return None
        if name.endswith("Tensor"):
            if not isinstance(factor.args[1], int | float):
                return None
            numbers.append(float(factor.args[1]))
        factor = same(factor.args[0])
    one, scale, floor, another = numbers
    return Tempered(both[0], both[1], floor, scale) if (one, another) == (1.0, 1.0) else None
