"""A still picture of a timeline: rows are streams, bars are ops, colours are micro-batches; SVG without scripts."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from moec.simulate.trace import EXPOSED_TRACK, Span

WIDTH, LEFT, ROW, GAP, TOP = 1160, 150, 26, 8, 34
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
EXPOSED, PLAIN = "#e45756", "#9a9a9a"
_PART = re.compile(r"\.(\d+)(?::\w+)?(?: \d+)?$")


def picture(spans: Sequence[Span], start_us: float, end_us: float, title: str = "") -> str:
    """The spans between two times as an SVG element; a row for each track of each device."""
    seen = [s for s in spans if s.us > 0 and s.start_us < end_us and s.start_us + s.us > start_us]
    devices = list(dict.fromkeys(s.device for s in spans))
    tracks = sorted(dict.fromkeys((s.device, s.track) for s in spans), key=lambda t: (devices.index(t[0]), t[1]))
    height = TOP + len(tracks) * (ROW + GAP) + 30
    scale = (WIDTH - LEFT - 10) / max(end_us - start_us, 1e-9)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<text x="{LEFT}" y="18" font-size="13">{html.escape(title)}</text>',
    ]
    rows = {track: TOP + i * (ROW + GAP) for i, track in enumerate(tracks)}
    for (device, track), y in rows.items():
        label = track if len(devices) == 1 else f"{device} {track}"
        parts.append(f'<text x="4" y="{y + 17}">{html.escape(label)}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 10}" height="{ROW}" fill="#f2f2f2"/>')
    for span in seen:
        y, x = rows[span.device, span.track], LEFT + (max(span.start_us, start_us) - start_us) * scale
        width = (min(span.start_us + span.us, end_us) - max(span.start_us, start_us)) * scale
        text = html.escape(f"{span.name}: {span.start_us:.1f} us + {span.us:.1f} us")
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{max(width, 0.4):.2f}" height="{ROW}" fill="{_colour(span)}"'
            f' stroke="#fff" stroke-width="0.5"><title>{text}</title></rect>'
        )
        label = _label(span.name)
        if width > 6.2 * len(label):
            parts.append(f'<text x="{x + 4:.2f}" y="{y + 17}" fill="#fff">{html.escape(label)}</text>')
    base = TOP + len(tracks) * (ROW + GAP) + 14
    for k in range(6):
        at = start_us + (end_us - start_us) * k / 5
        anchor = "end" if k == 5 else "start"
        parts.append(
            f'<text x="{LEFT + (at - start_us) * scale:.1f}" y="{base}" text-anchor="{anchor}">{at:.0f} us</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _label(name: str) -> str:
    """The name without its layer and, where a part of the name stays, without the family of ops."""
    name = name.split(" ")[0]
    rest = name.partition(".")[2]
    return rest if "." in rest else name


def _colour(span: Span) -> str:
    if span.track == EXPOSED_TRACK:
        return EXPOSED
    part = _PART.search(span.name)
    return COLOURS[int(part[1]) % len(COLOURS)] if part else PLAIN
