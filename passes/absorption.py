"""What the plain and the absorbed form of latent attention cost, and where one becomes cheaper than the other.

Only the ops that differ are counted: the read of the latent, its up-projection and the attention of the plain form; the
two products per head and the attention of the absorbed one. Times are those of the target's cost model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moec.ir import Function, Op
from moec.ir.dims import Size
from moec.ir.optable import OPS, operand_type
from moec.passes.base import Context
from moec.targets.cost import op_time

PLAIN, ABSORBED = "plain", "absorbed"
_PREFIXES = 8
"""Cached prefixes at which a chunk of a prompt is timed."""


@dataclass(frozen=True)
class Forms:
    """Both forms of one function's attention, on one device."""

    phase: str
    ops: Mapping[str, list[Op]]
    ctx: Context
    queries: int

    def times_us(self, context: int, new: int | None = None) -> dict[str, float]:
        """Microseconds of one layer for `new` tokens of each sequence that then have `context` tokens."""
        from moec.passes.planning.layout import Layout
        from moec.passes.planning.precision import candidates
        from moec.passes.planning.rows import Rows, Step

        limits, target = self.ctx.limits, self.ctx.target
        decode = self.phase == "decode"
        tokens = new or (self.queries if decode else min(limits.chunk, context))
        step = Step(self.phase, limits.batch if decode else 1, tokens, context)
        layout, recipe = Layout(1, 1, 1, 0, 0), candidates("auto", target)[0]
        found = {}
        for form, ops in self.ops.items():
            rows = Rows(step, layout, recipe, target, 1.0, 1, None)
            found[form] = sum(op_time(row, target).time_us for op in ops for row in rows.of(op, "whole"))
        return found

    def typical_us(self) -> dict[str, float]:
        """`times_us` at the compiled context; a prompt's chunks are averaged over the prefixes that they meet."""
        limits = self.ctx.limits
        contexts = [limits.context]
        if self.phase == "prefill" and limits.chunk < limits.context:
            chunks = -(-limits.context // limits.chunk)
            picked = {i * (chunks - 1) // max(1, min(chunks, _PREFIXES) - 1) for i in range(min(chunks, _PREFIXES))}
            contexts = [min(limits.context, (i + 1) * limits.chunk) for i in sorted(picked)]
        times = [self.times_us(c, min(limits.chunk, c) if self.phase == "prefill" else None) for c in contexts]
        return {form: sum(t[form] for t in times) / len(times) for form in self.ops}

    def crossover(self, limit: int) -> int | None:
        """The least context, at the same new tokens, from which the other form is cheaper; None up to `limit`."""
        from moec.passes.planning.forms import first_change

        new = self.queries if self.phase == "decode" else min(self.ctx.limits.chunk, limit)

        def absorbed_wins(context: int) -> bool:
            times = self.times_us(context, new)
            return times[ABSORBED] < times[PLAIN]

        return first_change(absorbed_wins, new, limit)

    def symbolic(self) -> str:
        """Operations and bytes of both forms as expressions of T new tokens, C context, S cached rows."""
        parts = []
        for form, ops in self.ops.items():
            flops: Size = 0
            moved: Size = 0
            for op in ops:
                types, results = [operand_type(o) for o in op.operands], [r.type for r in op.results]
                rule = OPS[op.name]
                flops = flops + rule.flops(types, results, op.attrs)
                moved = moved + rule.bytes_read(types, results, op.attrs)
                moved = moved + rule.bytes_written(types, results, op.attrs)
            parts.append(f"{form} {flops} operations and {moved} bytes")
        return "; ".join(parts)

    def figure(self, limit: int) -> str:
        """Times of both forms over the context, log-log, as SVG."""
        contexts = [c for c in (1 << n for n in range(4, 18)) if c <= limit] or [limit]
        new = self.queries if self.phase == "decode" else None
        points = {form: [] for form in self.ops}  # type: dict[str, list[tuple[int, float]]]
        for context in contexts:
            for form, time in self.times_us(context, new).items():
                points[form].append((context, time))
        title = f"{self.phase}: microseconds a layer over context, on {self.ctx.target.name}"
        return plot(title, points, self.ctx.limits.context)


def plot(title: str, series: Mapping[str, list[tuple[int, float]]], mark: int) -> str:
    """Lines over doubled x and logarithmic y; `mark` is a vertical line."""
    import math

    wide, high, left, top = 420, 220, 60, 26
    xs = [math.log2(x) for points in series.values() for x, _ in points]
    ys = [math.log10(max(y, 1e-3)) for points in series.values() for _, y in points]
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    low_y, high_y = math.floor(min(ys)), max(math.ceil(max(ys)), math.floor(min(ys)) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (math.log2(x) - low_x) / (high_x - low_x) * wide
        down = top + (high_y - math.log10(max(y, 1e-3))) / (high_y - low_y) * high
        return round(across, 1), round(down, 1)

    size = f'width="{left + wide + 90}" height="{top + high + 34}" font-size="11" font-family="sans-serif"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>']
    out.append(f'<text x="{left}" y="14">{title}</text>')
    for power in range(low_y, high_y + 1):
        _, y = at(2**low_x, 10.0**power)
        out.append(f'<line x1="{left}" x2="{left + wide}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    for power in range(math.ceil(low_x), math.floor(high_x) + 1, 2):
        x, _ = at(2.0**power, 1.0)
        out.append(f'<text x="{x}" y="{top + high + 16}" text-anchor="middle">{2**power}</text>')
    if low_x <= math.log2(mark) <= high_x:
        x, _ = at(mark, 1.0)
        out.append(f'<line x1="{x}" x2="{x}" y1="{top}" y2="{top + high}" stroke="#999" stroke-dasharray="4"/>')
    for (name, points), colour in zip(series.items(), ("#c33", "#36c"), strict=False):
        line = " ".join(f"{x},{y}" for x, y in (at(*p) for p in points))
        x, y = at(*points[-1])
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{x + 5}" y="{y + 4}" fill="{colour}">{name}</text>')
    return "".join([*out, "</svg>"])


def attention_ops(function: Function, site: Op) -> list[Op]:
    """The ops of one form that the other lacks, around `attn.mla` or `attn.mla_absorbed`."""
    producer = function.producer()
    if site.name == "attn.mla":
        project = producer[site.operands[1]]  # type: ignore[index]
        return [producer[project.operands[0]], project, site]  # type: ignore[index]
    uses = function.uses()
    after = [op for op in uses.get(site.result, []) if op.name == "linear.heads"]
    return [producer[site.operands[0]], site, *after]  # type: ignore[index]
