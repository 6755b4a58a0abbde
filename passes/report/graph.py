"""Pictures of functions: ops in layers from the arguments down, edges around the boxes that they pass (SVG)."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from moec.ir import Function, IndexType, Op, TensorType, Value
from moec.ir.printer import print_op

WIDTH, HEIGHT, DOWN, APART, BEND = 176, 42, 26, 14, 10
SWEEPS = 8
LOW = ("fp8", "fp4")


@dataclass(eq=False)
class _Node:
    """A box, or (`op` and `arg` both None) a point at which a long edge passes a row of boxes."""

    level: int
    op: Op | None = None
    arg: Value | None = None
    up: list[_Node] = field(default_factory=list)
    down: list[_Node] = field(default_factory=list)
    x: float = 0.0

    @property
    def width(self) -> int:
        """Pixels that it takes in its row."""
        return WIDTH if self.op or self.arg else BEND


def picture(function: Function, times: Mapping[Op, float], step_us: float) -> str:
    """The function as SVG; `times` are microseconds of one run of an op, coloured by their share of `step_us`."""
    rows = _rows(function)
    _order(rows)
    _place(rows)
    nodes = [n for row in rows for n in row]
    left = min((n.x - n.width / 2 for n in nodes), default=0) - APART
    right = max((n.x + n.width / 2 for n in nodes), default=WIDTH) + APART
    lines = [_edge(n) for n in nodes if n.op or n.arg]
    boxes = [_box(n, times, step_us) for n in nodes if n.op or n.arg]
    width, height = right - left, len(rows) * (HEIGHT + DOWN) + DOWN
    return (
        f'<svg width="{width:.0f}" height="{height}" viewBox="{left:.0f} 0 {width:.0f} {height}" '
        f'xmlns="http://www.w3.org/2000/svg" role="img">{"".join(lines + boxes)}</svg>'
    )


def _rows(function: Function) -> list[list[_Node]]:
    """Nodes by level, each op below all that it reads; long edges have a point in every row between."""
    made: dict[Value, _Node] = {}
    for arg in function.args:
        if isinstance(arg.type, TensorType) and not arg.type.dtype.startswith("i"):
            made[arg] = _Node(0, arg=arg)
    nodes = list(made.values())
    edges: list[tuple[_Node, _Node]] = []
    for op in function.ops:
        feeders = list(dict.fromkeys(made[v] for v in op.values() if v in made))
        node = _Node(max((f.level + 1 for f in feeders), default=1 if nodes else 0), op=op)
        edges += [(f, node) for f in feeders]
        # The layer's number reaches every weight: its edges would hide the others.
        made.update({r: node for r in op.results if not isinstance(r.type, IndexType)})
        nodes.append(node)
    for upper, lower in edges:
        at = upper
        for level in range(upper.level + 1, lower.level):
            between = _Node(level)
            nodes.append(between)
            at.down.append(between)
            between.up.append(at)
            at = between
        at.down.append(lower)
        lower.up.append(at)
    rows: list[list[_Node]] = [[] for _ in range(max((n.level for n in nodes), default=-1) + 1)]
    for node in nodes:
        rows[node.level].append(node)
    return rows


def _order(rows: list[list[_Node]]) -> None:
    """Fewer crossings: each row is sorted by the mean place of its neighbours, from above and from below in turn."""
    for sweep in range(SWEEPS):
        downward = sweep % 2 == 0
        for row in rows if downward else reversed(rows):
            place = {n: i for r in rows for i, n in enumerate(r)}

            def mean(node: _Node, place: dict[_Node, int] = place, downward: bool = downward) -> float:
                near = node.up if downward else node.down
                return sum(place[n] for n in near) / len(near) if near else place[node]

            row.sort(key=mean)


def _place(rows: list[list[_Node]]) -> None:
    """Horizontal positions: near the mean of the neighbours, in order, boxes apart."""
    for row in rows:
        x = 0.0
        for node in row:
            node.x = x + node.width / 2
            x += node.width + APART
        for node in row:
            node.x -= x / 2
    for sweep in range(2 * SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = []
            for node in row:
                near = (node.up if sweep % 2 == 0 else node.down) or node.up or node.down
                wanted.append(sum(n.x for n in near) / len(near) if near else node.x)
            _apart(row, wanted)


def _apart(row: list[_Node], wanted: list[float]) -> None:
    """The places closest to `wanted` (least squares) that keep order and distance: pools of neighbours are merged."""
    offsets = [0.0]
    for a, b in pairwise(row):
        offsets.append(offsets[-1] + (a.width + b.width) / 2 + APART)
    pools: list[tuple[float, int]] = []
    for w, o in zip(wanted, offsets, strict=True):
        pools.append((w - o, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (m1, c1), (m2, c2) = pools[-2:]
            pools[-2:] = [((m1 * c1 + m2 * c2) / (c1 + c2), c1 + c2)]
    means = [m for m, count in pools for _ in range(count)]
    for node, mean, offset in zip(row, means, offsets, strict=True):
        node.x = mean + offset


def _top(node: _Node) -> float:
    return node.level * (HEIGHT + DOWN) + DOWN / 2


def _edge(node: _Node) -> str:
    """The edges from a box to the boxes that use it, each one smooth line through its points."""
    out = []
    for first in node.down:
        x, y = node.x, _top(node) + HEIGHT
        path = [f"M{x:.0f} {y:.0f}"]
        at = first
        while True:
            end = _top(at)
            middle = (y + end) / 2
            path.append(f"C{x:.0f} {middle:.0f} {at.x:.0f} {middle:.0f} {at.x:.0f} {end:.0f}")
            if at.op or at.arg:
                break
            path.append(f"L{at.x:.0f} {end + HEIGHT:.0f}")
            x, y, at = at.x, end + HEIGHT, at.down[0]
        out.append(f'<path d="{" ".join(path)}"/>')
    return "".join(out)


def _box(node: _Node, times: Mapping[Op, float], step_us: float) -> str:
    x, y = node.x - WIDTH / 2, _top(node)
    if node.arg is not None:
        return (
            f'<g><rect class="arg" x="{x:.0f}" y="{y + 8:.0f}" width="{WIDTH}" height="{HEIGHT - 8}" rx="16"/>'
            f'<text x="{node.x:.0f}" y="{y + 28:.0f}" class="mid">%{html.escape(node.arg.name)}: '
            f"{html.escape(str(node.arg.type))}</text></g>"
        )
    assert node.op is not None
    op = node.op
    type_ = op.results[0].type if op.results else None
    plain = isinstance(type_, TensorType) and TensorType(type_.dtype, type_.shape)
    shown = html.escape(str(plain or ""))
    low = any(word in str(o.type) for o in op.operands for word in LOW)
    weights = ", ".join(o.name for o in op.operands if not isinstance(o, Value))
    us = times.get(op)
    time = "" if us is None else f"{us:.1f} us" if us >= 0.05 else "view"
    share = min(1.0, (us or 0.0) / step_us) if step_us else 0.0
    bar = f'<rect class="bar" x="{x:.0f}" y="{y + HEIGHT - 4:.0f}" width="{WIDTH * share:.1f}" height="4"/>'
    name = op.name + (f" {html.escape(_short(weights))}" if weights else "")
    return (
        f'<g><rect class="op{" low" if low else ""}" x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="4">'
        f"<title>{html.escape(print_op(op))}</title></rect>{bar}"
        f'<text x="{x + 6:.0f}" y="{y + 14:.0f}">{name}</text>'
        f'<text x="{x + 6:.0f}" y="{y + 30:.0f}" class="type">{shown}</text>'
        f'<text x="{x + WIDTH - 6:.0f}" y="{y + 30:.0f}" class="time">{time}</text></g>'
    )


def _short(weights: str) -> str:
    """The end of a weight's name, which tells it from its neighbours."""
    last = weights.split(", ")[0].rsplit(".", 1)[-1]
    return last if len(last) <= 12 else last[:11] + "…"
