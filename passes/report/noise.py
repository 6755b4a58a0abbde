"""The section of the report on what number formats cost: it needs the weights, and is added once they are packed."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.ir.accounting import Noise

PLACE = "<!-- quantisation -->"


def add_quantisation(page: Path, noises: Sequence[Noise]) -> None:
    """Add to a written report the measured noise of stored weights and of their products, worst first."""
    rows = []
    for n in noises:
        ratios = ["exact" if math.isinf(db) else f"{db:.2f}" for db in (n.weight_db, n.product_db)]
        name = f"@{n.weight}[{', '.join(map(str, n.point))}]"
        cells = "".join(f"<td>{html.escape(c)}</td>" for c in (name, n.stored, n.input, *ratios))
        rows.append(f"<tr>{cells}</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("weight", "stored as", "input", "weight, dB", "product, dB"))
    table = f'<h2 id="noise">Signal to noise of number formats</h2><table><tr>{head}</tr>{"".join(rows)}</table>'
    page.write_text(page.read_text(encoding="utf-8").replace(PLACE, table), encoding="utf-8")
