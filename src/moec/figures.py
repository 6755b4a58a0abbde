"""Numbers as a reader of tables wants them."""

from __future__ import annotations


def figures(value: float, digits: int = 4) -> str:
    """`value` with so many significant digits; a great one with commas between thousands in place of an exponent."""
    text = f"{value:,.{digits}g}"
    return f"{float(text):,.0f}" if "e+" in text else text
