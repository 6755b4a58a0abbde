"""Tables of the GPU benchmark."""

from __future__ import annotations

from collections.abc import Sequence

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
