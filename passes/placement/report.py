"""One self-contained page: balance of every layer, traffic of every link as a picture, what redundancy buys."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape

import numpy as np
from numpy.typing import NDArray

from moec.passes.placement.problem import Floats
from moec.passes.placement.solve import Result
from moec.passes.placement.summary import Redundancy, TrafficEstimate
from moec.passes.placement.traffic import Traffic

# Light to dark blue, by linear steps between these.
_RAMP = np.array([[247, 251, 255], [158, 202, 225], [49, 130, 189], [8, 48, 107]], dtype=np.float64)
_MOST_NODES_AS_NUMBERS = 20
_PICTURE = 480

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; margin: .5rem 0 1rem; } td, th { padding: .2rem .55rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } .heat td { min-width: 2.6rem; font-size: 12px; }
img { image-rendering: pixelated; border: 1px solid #d0d7de; } figure { display: inline-block; margin: 0 1rem 1rem 0; }
figcaption, .note { color: #57606a; font-size: 13px; } svg text { font: 11px system-ui, sans-serif; fill: #57606a; }
"""


def render(result: Result, traffic: TrafficEstimate | None, redundancy: list[Redundancy]) -> str:
    """The page as HTML; it loads nothing from anywhere."""
    problem = result.problem
    sections = [_figures(result), _layers(result), _redundancy(redundancy, problem.slots_per_device)]
    if traffic is not None:
        sections.append(_links(result, traffic))
    title = f"{problem.experts} experts on {problem.devices} devices x {problem.slots_per_device} slots"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1>{''.join(sections)}</html>\n"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _figures(result: Result) -> str:
    rows = [
        [name, f"{values.mean():.4f}", f"{values.max():.4f}", str(int(values.argmax()))]
        for name, values in (
            ("greatest device load / lower bound", result.balance),
            ("greatest device load / mean device load", result.over_mean),
        )
    ]
    note = ""
    if result.problem.bound_to_nodes:
        price = result.price_of_groups
        rows.append(
            ["price of groups (bound with / without)", f"{price.mean():.4f}", f"{price.max():.4f}", str(price.argmax())]
        )
        note = (
            '<p class="note">Binding each group to one node caps the nodes that a token visits; the price is the load '
            "that the fullest node must carry at least, whatever is placed how inside it.</p>"
        )
    return "<h2>Balance</h2>" + _table(["", "mean", "worst", "in layer"], rows) + note


def _layers(result: Result) -> str:
    """Bars of greatest over mean device load, with the lower bound of each layer as a line."""
    over = result.over_mean
    mean = np.where(result.greatest > 0, result.greatest / over, 1.0)
    bound = np.where(result.greatest > 0, result.bound / mean, 1.0)
    width, height, left = 860, 180, 44
    top = max(float(over.max()), 1.0) * 1.02
    step = (width - left) / len(over)
    marks = []
    for layer, (value, least) in enumerate(zip(over, bound, strict=True)):
        x, tall = left + layer * step, height * value / top
        marks.append(
            f'<rect x="{x:.1f}" y="{height - tall:.1f}" width="{max(step - 1.5, 0.5):.1f}" height="{tall:.1f}" '
            f'fill="#3182bd"><title>layer {layer}: {value:.4f} of the mean, bound {least:.4f}</title></rect>'
            f'<path d="M{x:.1f} {height - height * least / top:.1f}h{max(step - 1.5, 0.5):.1f}" stroke="#d1242f"/>'
        )
    axis = "".join(
        f'<text x="0" y="{height - height * v / top + 4:.1f}">{v:.2f}</text>' for v in (0.0, 0.5, 1.0, top / 1.02)
    )
    return (
        f'<svg viewBox="0 0 {width} {height + 18}" width="{width}" role="img">{axis}{"".join(marks)}'
        f'<text x="{left}" y="{height + 14}">layer 0 to {len(over) - 1}: greatest over mean device load '
        "(bars), lower bound (lines)</text></svg>"
    )


def _redundancy(curve: list[Redundancy], current: int) -> str:
    rows = [
        [
            f"{point.slots_per_device}{' (this placement)' if point.slots_per_device == current else ''}",
            str(point.redundant),
            f"{point.mean:.4f}",
            f"{point.worst:.4f}",
        ]
        for point in curve
    ]
    head = ["slots a device", "redundant slots", "greatest / mean load, mean of layers", "worst layer"]
    return "<h2>What redundancy buys</h2>" + _table(head, rows)


def _links(result: Result, estimate: TrafficEstimate) -> str:
    least, most = estimate.least, estimate.most
    low, high = least.copies_forwarded, most.copies_forwarded
    forwarded = f"{high:.2f}" if np.isclose(low, high) else f"{low:.2f} to {high:.2f}"
    source = (
        "Choices were sampled from the loads, as if experts were chosen independently."
        if estimate.sampled
        else "Bounds that loads and recorded co-activation imply; pictures show the upper one."
    )
    text = (
        "<h2>Traffic between nodes</h2>"
        + _table(
            ["copies of a token that leave its node", "per layer"],
            [["one for each chosen expert", f"{most.copies_direct:.2f}"], ["one for each visited node", forwarded]],
        )
        + f'<p class="note">{source} Tokens start evenly on all devices. A row is the sender, a column the receiver; '
        "copies per 1000 tokens.</p>"
    )
    pictures = []
    for forwarding, name in ((False, "without forwarding"), (True, "with forwarding inside nodes")):
        pairs = most.between(forwarding=forwarding) * 1000
        body = _heat_table(pairs) if len(pairs) <= _MOST_NODES_AS_NUMBERS else _image(pairs)
        pictures.append(f"<figure><figcaption>pairs of nodes, {name}</figcaption>{body}</figure>")
    for forwarding, name in ((False, "without forwarding"), (True, "with forwarding inside nodes")):
        pairs = device_links(result, most, forwarding=forwarding) * 1000
        pictures.append(
            f"<figure><figcaption>pairs of devices, {name}; darkest {pairs.max():.1f}</figcaption>"
            f"{_image(pairs)}</figure>"
        )
    return text + "".join(pictures)


def device_links(result: Result, traffic: Traffic, *, forwarding: bool) -> Floats:
    """Copies per token from each device (row) to each other device (column), mean over layers.

    Without forwarding every sender reaches the experts' devices directly. With it a copy crosses to the device of the
    same number in the receiving node, and that one passes it on inside the node.
    """
    problem = result.problem
    loads = result.placement.device_loads(problem.loads)
    share = (loads / np.maximum(loads.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)).mean(axis=0)
    received = share * traffic.direct.sum(axis=1).mean()
    devices, size = problem.devices, problem.devices // problem.nodes
    if not forwarding:
        links = np.repeat(received[None, :] / devices, devices, axis=0)
    else:
        crossing = traffic.forwarded.mean(axis=0)[np.arange(devices) // size] / devices
        same_number = np.arange(devices)[:, None] % size == np.arange(devices)[None, :] % size
        same_node = np.arange(devices)[:, None] // size == np.arange(devices)[None, :] // size
        links = same_number * ~same_node * crossing[None, :] + same_node * received[None, :] / size
    np.fill_diagonal(links, 0.0)
    return np.asarray(links)


def _colours(values: Floats) -> NDArray[np.uint8]:
    top = values.max()
    at = (values / top if top > 0 else values) * (len(_RAMP) - 1)
    low = np.minimum(at.astype(int), len(_RAMP) - 2)
    part = (at - low)[..., None]
    return np.asarray((_RAMP[low] * (1 - part) + _RAMP[low + 1] * part).round().astype(np.uint8))


def _heat_table(pairs: Floats) -> str:
    colours = _colours(pairs)
    rows = []
    for sender, (values, shades) in enumerate(zip(pairs, colours, strict=True)):
        cells = "".join(
            f'<td style="background:rgb({r},{g},{b});color:{"#fff" if int(r) + int(g) + int(b) < 380 else "#1b1f24"}">'
            f"{'' if sender == receiver else f'{value:.0f}'}</td>"
            for receiver, (value, (r, g, b)) in enumerate(zip(values, shades, strict=True))
        )
        rows.append(f"<tr><td>{sender}</td>{cells}</tr>")
    head = "".join(f"<th>{n}</th>" for n in range(len(pairs)))
    return f'<table class="heat"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _image(pairs: Floats) -> str:
    data = base64.b64encode(_png(_colours(pairs))).decode("ascii")
    return f'<img width="{_PICTURE}" height="{_PICTURE}" alt="traffic" src="data:image/png;base64,{data}">'


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """An RGB image [height, width, 3] as PNG (ISO/IEC 15948): header, filtered rows, end."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
