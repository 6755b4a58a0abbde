"""Plots of a plan as SVG text: roofline, breakdown of a step, latency and rate over the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from moec.passes.planning.plan import PhasePlan
from moec.passes.planning.search import Candidate

COLOURS = {"compute": "#2f6fb3", "memory": "#3f9b5f", "network": "#c8742b", "latency": "#8a8f98"}
"""What bounds an op -> its colour on every plot."""

_WIDTH, _HEIGHT = 620, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 18, 46
_LARGEST = 16.0


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels; `ticks` are (value, text)."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: list[tuple[float, str]]

    def at(self, value: float) -> float:
        """The pixel of a value, clipped to the axis."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def log_axis(low: float, high: float, start: float, end: float) -> Axis:
    """Whole powers of ten around the values."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    return Axis(10.0**first, 10.0**last, start, end, True, [(10.0**p, _power(p)) for p in range(first, last + 1)])


def linear_axis(high: float, start: float, end: float) -> Axis:
    """From 0 to a round number above `high`, with about five ticks."""
    step = 10 ** math.floor(math.log10(high / 4)) if high > 0 else 1.0
    step *= next(f for f in (1, 2, 5, 10) if high / (step * f) <= 5)
    count = math.ceil(high / step - 1e-9)
    return Axis(0.0, count * step, start, end, False, [(k * step, f"{k * step:g}") for k in range(count + 1)])


def _power(exponent: int) -> str:
    return f"{10**exponent:,}" if 0 <= exponent <= 4 else f"{10.0**exponent:g}"


def roofline(phase: PhasePlan) -> str:
    """Every op at its operations a byte and its TFLOP/s, under the roofs of memory and matrix units.

    The area of a point is its share of the step's time; ops that compute nothing are left out.
    """
    device = phase.target.device
    shown = [op for op in phase.ops if op.cost.flops and op.cost.bytes and not op.communication]
    roofs = {name: device.matrix_rates[name] for name in ("fp8", "bf16", "fp32") if name in device.matrix_rates}
    points = [(op.cost.flops / op.cost.bytes, op.cost.flops / op.cost.time_us / 1e6) for op in shown]
    top = max(roofs.values()) / 1e12
    x = log_axis(min([1.0, *(p[0] for p in points)]), max([1e4, *(p[0] for p in points)]), _LEFT, _WIDTH - _RIGHT)
    y = log_axis(min([top / 1e3, *(p[1] for p in points)]), top, _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x, y, "operations a byte of memory traffic", "TFLOP/s of a device")]
    for name, rate in roofs.items():
        ridge = rate / device.memory_bandwidth
        height = y.at(rate / 1e12)
        parts.append(
            _line([(x.at(ridge), height), (x.end, height)], "#5b6675", f"{name} peak, {rate / 1e12:,.0f} TFLOP/s")
        )
        parts.append(_text(x.end - 4, height - 4, f"{name} {rate / 1e12:,.0f}", "end"))
    ridge = max(roofs.values()) / device.memory_bandwidth
    lowest = max(x.low, y.low * 1e12 / device.memory_bandwidth)
    slope = [(x.at(lowest), y.at(lowest * device.memory_bandwidth / 1e12)), (x.at(ridge), y.at(top))]
    parts.append(_line(slope, "#5b6675", f"memory, {device.memory_bandwidth / 1e12:g} TB/s"))
    for op, (intensity, rate) in sorted(zip(shown, points, strict=True), key=lambda item: -item[0].cost.time_us):
        share = op.cost.time_us / phase.serial_us
        radius = max(2.0, _LARGEST * math.sqrt(share))
        title = f"{op.name}: {share:.1%} of the time, {intensity:,.3g} operations a byte, {rate:,.4g} TFLOP/s"
        colour = COLOURS[op.cost.bound]
        parts.append(
            f'<circle cx="{x.at(intensity):.1f}" cy="{y.at(rate):.1f}" r="{radius:.1f}" fill="{colour}" '
            f'fill-opacity="0.55" stroke="{colour}"><title>{escape(title)}</title></circle>'
        )
    return _svg(parts, _HEIGHT)


def breakdown(phase: PhasePlan, most: int = 10) -> str:
    """A bar an op, longest first, coloured by what bounds it; its share of the time one after the other beside it."""
    ops = sorted(phase.ops, key=lambda op: -op.cost.time_us)
    rows: list[tuple[str, float, str, str]] = [
        (f"{op.name} ({op.op})", op.cost.time_us, COLOURS[op.cost.bound], op.cost.bound) for op in ops[:most]
    ]
    if rest := sum(op.cost.time_us for op in ops[most:]):
        rows.append((f"{len(ops) - most} more", rest, "#c3c9d1", "several"))
    left, height, row = 270, 24 * len(rows) + _BOTTOM, 24
    x = linear_axis(max(time for _, time, _, _ in rows) / 1e3, left, _WIDTH - 60)
    parts = [_x_axis(x, height - _BOTTOM + 4, "milliseconds of a step, one op after the other")]
    for index, (name, time, colour, bound) in enumerate(rows):
        top, width = index * row, x.at(time / 1e3) - left
        share = f"{time / phase.serial_us:.1%}"
        title = f"{name}: {time / 1e3:,.4g} ms, {share}, bound by {bound}"
        parts.append(_text(left - 6, top + 15, name, "end"))
        parts.append(
            f'<rect x="{left}" y="{top + 3}" width="{max(width, 1):.1f}" height="{row - 7}" fill="{colour}">'
            f"<title>{escape(title)}</title></rect>"
        )
        parts.append(_text(left + width + 4, top + 15, share, "start"))
    return _svg(parts, height)


def batch_curve(points: Sequence[Candidate], batch: int, capacity: float) -> str:
    """Milliseconds of a token and tokens/s of a device over the batch; hollow points do not fit the memory."""
    left = _curve(points, batch, capacity, lambda c: c.time_us / 1e3, "milliseconds of a token")
    right = _curve(points, batch, capacity, lambda c: c.per_device, "tokens/s of a device")
    return left + right


def _curve(
    points: Sequence[Candidate], batch: int, capacity: float, value: Callable[[Candidate], float], name: str
) -> str:
    batches = [p.batch for p in points]
    x = log_axis(min(batches), max(batches), _LEFT, _WIDTH - _RIGHT)
    y = linear_axis(max(value(p) for p in points), _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x, y, "requests of a replica", name)]
    parts.append(_line([(x.at(p.batch), y.at(value(p))) for p in points], "#5b6675", name))
    for p in points:
        fits = p.memory.total <= capacity
        fill = "#2f6fb3" if fits else "#ffffff"
        title = f"batch {p.batch}: {value(p):,.4g} {name}" + (", two micro-batches" if p.overlapped else "")
        title += "" if fits else f", does not fit ({p.memory.total / 1e9:.1f} GB)"
        radius = 6 if p.batch == batch else 4
        parts.append(
            f'<circle cx="{x.at(p.batch):.1f}" cy="{y.at(value(p)):.1f}" r="{radius}" fill="{fill}" stroke="#2f6fb3">'
            f"<title>{escape(title)}</title></circle>"
        )
    return _svg(parts, _HEIGHT)


def legend() -> str:
    """The colours of the bounds."""
    return "".join(f'<span class="key"><i style="background:{c}"></i>{name}</span>' for name, c in COLOURS.items())


def _svg(parts: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def _frame(x: Axis, y: Axis, x_name: str, y_name: str) -> str:
    parts = [_x_axis(x, y.start, x_name)]
    for value, text in y.ticks:
        height = y.at(value)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(_text(x.start - 6, height + 4, text, "end"))
    middle = (y.start + y.end) / 2
    parts.append(
        f'<text class="name" transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">{y_name}</text>'
    )
    return "".join(parts)


def _x_axis(x: Axis, bottom: float, name: str) -> str:
    parts = [f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{bottom}" y2="{bottom}"/>']
    for value, text in x.ticks:
        place = x.at(value)
        parts.append(f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_text(place, bottom + 17, text, "middle"))
    parts.append(_text((x.start + x.end) / 2, bottom + 36, name, "middle", "name"))
    return "".join(parts)


def _line(points: Sequence[tuple[float, float]], colour: str, title: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5">'
        f"<title>{escape(title)}</title></polyline>"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
