"""Two texts side by side: changed lines opposite each other, long unchanged stretches left out."""

from __future__ import annotations

from difflib import SequenceMatcher

UNCHANGED = 2
"""Unchanged lines shown around a change."""
Row = tuple[str, str, str, str]


def side_by_side(a: list[str], b: list[str]) -> list[Row]:
    """Rows (kind, left, right, how many unchanged lines are left out); empty when the texts are equal."""
    if a == b:
        return []
    rows: list[Row] = []
    for tag, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            rows += _context(a[i:j], first=i == 0, last=j == len(a))
            continue
        left, right = a[i:j], b[k:m]
        for n in range(max(len(left), len(right))):
            rows.append(("change", left[n] if n < len(left) else "", right[n] if n < len(right) else "", ""))
    return rows


def _context(lines: list[str], *, first: bool, last: bool) -> list[Row]:
    head, tail = 0 if first else UNCHANGED, 0 if last else UNCHANGED
    if len(lines) <= head + tail:
        return [("same", line, line, "") for line in lines]
    shown = [("same", line, line, "") for line in lines[:head]]
    left_out = len(lines) - head - tail
    shown.append(("gap", "", "", f"{left_out} unchanged lines"))
    return [*shown, *(("same", line, line, "") for line in lines[len(lines) - tail :])]
