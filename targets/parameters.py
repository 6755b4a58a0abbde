"""The cost model's parameters: meaning, unit and range of each. Values stand in the target files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class ParameterField:
    """One calibrated number; `low` and `high` (base units) also bound the fit."""

    path: str
    dimension: str
    low: float
    high: float
    doc: str


PARAMETERS: Final[dict[str, ParameterField]] = {}
