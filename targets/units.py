"""Quantities with units: `3.35 TB/s` -> 3.35e12. Decimal prefixes are powers of 1000, KiB is 1024 bytes."""

from __future__ import annotations

import math
import re
from typing import Final

_DECIMAL: Final = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY: Final = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_BYTES: Final = {f"{p}B": f for p, f in (_DECIMAL | _BINARY).items()}
_BITS_PER_S: Final = {f"{p}{b}/s": f / 8 for p, f in _DECIMAL.items() for b in ("b", "bit")}
_COUNTED: Final = (
    "SM",
    "CU",
    "core",
    "GPU",
    "device",
    "node",
    "NIC",
    "plane",
    "port",
    "layer",
    "rank",
    "row",
)

UNITS: Final[dict[str, dict[str, float]]] = {
    "bytes": _BYTES,
    "bandwidth": {f"{u}/s": f for u, f in _BYTES.items()} | _BITS_PER_S,
    "rate": {f"{p}{w}": f for p, f in _DECIMAL.items() for w in ("FLOPS", "FLOP/s")},
    "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
    "frequency": {f"{p}Hz": f for p, f in _DECIMAL.items()},
    "bits": {"bit": 1.0, "bits": 1.0},
    "count": {form: 1.0 for word in _COUNTED for form in (word, word + "s")},
    "ratio": {"": 1.0, "%": 0.01},
}
"""Dimension -> unit -> factor to the base unit (B, B/s, FLOP/s, s, Hz, bit, 1)."""

EXAMPLES: Final = {
    "bytes": "80 GB",
    "bandwidth": "3.35 TB/s",
    "rate": "989 TFLOPS",
    "time": "3 us",
    "frequency": "1.83 GHz",
    "bits": "256 bit",
    "count": "8 GPU",
    "ratio": "0.8 or 80 %",
}

_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S*)\s*")


def parse(text: str, dimension: str) -> float:
    """The quantity in its base unit; ValueError says what is wrong and what would be right."""
    match = _QUANTITY.fullmatch(text)
    example = EXAMPLES[dimension]
    if match is None:
        raise ValueError(f"{text!r} is not a number with a unit; expected something like {example}")
    number, unit = float(match[1]), match[2]
    factors = UNITS[dimension]
    if unit not in factors:
        raise ValueError(_wrong_unit(unit, dimension, example))
    value = number * factors[unit]
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    if dimension in ("count", "bits") and value != int(value):
        raise ValueError(f"{text!r} must be a whole number")
    return value


def _wrong_unit(unit: str, dimension: str, example: str) -> str:
    if not unit:
        return f"has no unit; expected {dimension} such as {example}"
    others = [name for name, known in UNITS.items() if unit in known]
    meaning = f"is a unit of {others[0]}" if others else "is not a unit"
    return f"{unit!r} {meaning}; expected {dimension} such as {example}"


def show(value: float, dimension: str, counted: str = "device") -> str:
    """A text that `parse` reads back to the same number; `counted` names what a count counts."""
    if dimension == "ratio":
        return repr(value)
    if dimension in ("count", "bits"):
        return f"{value:.0f} {'bit' if dimension == 'bits' else counted}"
    if dimension == "time":
        return f"{_short(value * 1e6)} us"
    base = {"bytes": "B", "bandwidth": "B/s", "rate": "FLOPS", "frequency": "Hz"}[dimension]
    for prefix in ("T", "G", "M", "k"):
        if abs(value) >= _DECIMAL[prefix]:
            return f"{_short(value / _DECIMAL[prefix])} {prefix}{base}"
    return f"{_short(value)} {base}"


def _short(value: float) -> str:
    return repr(float(f"{value:.12g}")).removesuffix(".0")
