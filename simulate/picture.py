"""A still picture of a timeline: rows are streams, bars are ops, colours are micro-batches; SVG without scripts."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moec.simulate.trace import EXPOSED_TRACK, Span

WIDTH, LEFT, ROW, GAP, TOP = 1160, 150, 26, 8, 34
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
EXPOSED, PLAIN = "#e45756", "#9a9a9a"
_NAME = re.compile(r"(?:(?:send|receive) )?(?P<op>[^ #]*?)(?:\.(?P<part>\d+))?(?::\w+)?(?: (?P<layer>\d+))?(?:#\d+)?\Z")
_LETTER = 6.0
"""Width of a letter of a bar's label in pixels, on average."""
_EDGE = 3.0
"""Bars from this width on have an edge: narrower ones would be all edge."""


def picture(spans: Sequence[Span], start_us: float, end_us: float, title: str = "") -> str:
    """The spans between two times as an SVG element; a row for each track of each device, and what colours mean."""
    seen = [s for s in spans if s.us > 0 and s.start_us < end_us and s.start_us + s.us > start_us]
    devices = list(dict.fromkeys(s.device for s in spans))
    tracks = sorted(dict.fromkeys((s.device, s.track) for s in spans), key=lambda t: (devices.index(t[0]), t[1]))
    base = TOP + len(tracks) * (ROW + GAP)
    scale = (WIDTH - LEFT - 10) / max(end_us - start_us, 1e-9)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {base + 46}" width="{WIDTH}"'
        f' height="{base + 46}" font-family="sans-serif" font-size="11">',
        f'<text x="{LEFT}" y="18" font-size="13">{html.escape(title)}</text>',
    ]
    rows = {track: TOP + i * (ROW + GAP) for i, track in enumerate(tracks)}
    for (device, track), y in rows.items():
        label = track if len(devices) == 1 else f"{device} {track}"
        parts.append(f'<text x="4" y="{y + 17}">{html.escape(label)}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 10}" height="{ROW}" fill="#f2f2f2"/>')
    bars = []
    for span in seen:
        y, x = rows[span.device, span.track], LEFT + (max(span.start_us, start_us) - start_us) * scale
        width = (min(span.start_us + span.us, end_us) - max(span.start_us, start_us)) * scale
        bars.append(_Bar(span, x, y, width))
        text = html.escape(f"{span.name}: {span.start_us:.1f} us + {span.us:.1f} us")
        edge = ' stroke="#fff" stroke-width="0.5"' if width >= _EDGE else ""
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{max(width, 0.4):.2f}" height="{ROW}" fill="{_colour(span)}"{edge}>'
            f"<title>{text}</title></rect>"
        )
    for bar, label in _labels(bars):
        parts.append(f'<text x="{bar.x + 3:.2f}" y="{bar.y + 17}" fill="#fff">{html.escape(label)}</text>')
    for k in range(6):
        at = start_us + (end_us - start_us) * k / 5
        x, anchor = LEFT + (at - start_us) * scale, "end" if k == 5 else "start"
        parts.append(f'<path d="M{x:.1f} {TOP - 4}V{base}" stroke="#000" stroke-opacity="0.25" stroke-width="0.5"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 12}" text-anchor="{anchor}">{at:.0f} us</text>')
    return "\n".join([*parts, *_legend(seen, base + 24), "</svg>"]) + "\n"


def _legend(spans: Sequence[Span], y: int) -> list[str]:
    """What the colours of these spans mean, in a line."""
    numbers = sorted({int(part) for s in spans if (part := _named(s)[1]) is not None and s.track != EXPOSED_TRACK})
    meanings = [(COLOURS[k % len(COLOURS)], f"micro-batch {k}") for k in numbers]
    if any(_colour(s) == PLAIN for s in spans):
        meanings.append((PLAIN, "whole batch"))
    shown = sum(s.us for s in spans if s.track == EXPOSED_TRACK)
    meanings.append((EXPOSED, "communication that no computation hides" if shown else "no communication is exposed"))
    parts, x = [], LEFT
    for colour, text in meanings:
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="{y + 10}">{html.escape(text)}</text>')
        x += 40 + round(_LETTER * len(text))
    return parts


def _named(span: Span) -> tuple[str, str | None, str | None]:
    """Op, micro-batch and layer of a span's name (`moe.dispatch.1:send 30#7`)."""
    found = _NAME.match(span.name)
    return (found["op"], found["part"], found["layer"]) if found else (span.name, None, None)


@dataclass(frozen=True)
class _Bar:
    span: Span
    x: float
    y: float
    width: float


def _labels(bars: Sequence[_Bar]) -> Iterator[tuple[_Bar, str]]:
    """Where labels begin: in every bar that has room for its own; in a run of narrow ones its longest op names all."""
    run: list[_Bar] = []
    for bar in [*sorted(bars, key=lambda b: (b.y, b.x)), None]:
        last = run[-1] if run else None
        own = _label(bar.span, bar.width) if bar else ""
        touches = bar and last and bar.y == last.y and bar.x - last.x - last.width < 1
        if last and not (bar and touches and not own and _colour(bar.span) == _colour(last.span)):
            longest = max(run, key=lambda b: b.width)
            if text := _label(longest.span, last.x + last.width - run[0].x, "..." if len(run) > 1 else ""):
                yield run[0], text
            run = []
        if bar and own:
            yield bar, own
        elif bar:
            run.append(bar)


def _label(span: Span, width: float, more: str = "") -> str:
    """As much of the op's own name, then of its layer, as fits into so many pixels."""
    op, _, layer = _named(span)
    name = op.rpartition(".")[2] + more if span.track != EXPOSED_TRACK else f"{span.us:.0f} us"
    room = int((width - 5) / _LETTER)
    whole = f"{name} {layer}" if layer is not None else name
    return next((text for text in (whole, name) if len(text) <= room), "")


def _colour(span: Span) -> str:
    if span.track == EXPOSED_TRACK:
        return EXPOSED
    part = _named(span)[1]
    return PLAIN if part is None else COLOURS[int(part) % len(COLOURS)]
