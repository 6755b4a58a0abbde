"""Tables of the GPU benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_timing import Row


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns padded to their widest cell; the first two to the left, numbers to the right."""
    cells = [head, *rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        padded = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])


def measured_table(rows: Sequence[Row]) -> str:
    """Times and rates."""
    return table(
        ("kernel", "sizes", "us", "TFLOP/s", "GB/s", "beside (us)"),
        [
            (r.kernel, r.sizes, f"{r.microseconds:.1f}", f"{r.tflops:.1f}", f"{r.gbytes_per_s:.0f}",
             ", ".join(f"{n} {t:.1f}" for n, t in r.peers.items()))
            for r in rows
        ],
    )  # fmt: skip


def launch_table(launches: Sequence[Mapping[str, Any]]) -> str:
    """The launches of a program's steps, each beside its bound."""
    head = ("launch", "at", "a step", "us", "PREDICTED us", "TFLOP/s", "GB/s")
    return table(
        head,
        [
            (x["kernel"], f"{x['phase']} {x['tokens']}", f"{x['times']}", f"{x['us']:.1f}", f"{x['predicted_us']:.1f}",
             f"{x['flops'] / x['us'] / 1e6:.1f}", f"{x['bytes'] / x['us'] / 1e3:.0f}")
            for x in launches
        ],
    )  # fmt: skip
