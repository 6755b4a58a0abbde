"""Pieces that the op models share: the soft maximum, tiles and waves, and a target's fitted numbers by family."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from moec.targets.cost.errors import Uncalibrated
from moec.targets.parameters import PARAMETERS
from moec.targets.schema import Target


def ceildiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def soft_max(a: float, b: float, p: float) -> float:
    """The p-norm of two times: their sum for p = 1 (no overlap), their maximum for large p (perfect overlap)."""
    high, low = max(a, b), min(a, b)
    return high if high <= 0 else high * (1 + (low / high) ** p) ** (1 / p)


_NAMES: dict[str, list[str]] = {}
for _path in PARAMETERS:
    _, _family, _name = _path.split(".")
    _NAMES.setdefault(_family, []).append(_name)


def fitted(target: Target, family: str) -> Mapping[str, float]:
    """The calibration numbers of one family, by name; Uncalibrated when the target's file lacks one."""
    found = target.families.get(family, {})
    if len(found) < len(_NAMES[family]):
        missing = next(name for name in _NAMES[family] if name not in found)
        raise Uncalibrated(target=target.name, parameter=f"calibration.{family}.{missing}")
    return found


def throttled(target: Target, busy: float, sustained: float) -> float:
    """Seconds that `busy` seconds at the full matrix rate take when the power limit lowers the clock meanwhile.

    A call lowers it by its own length; one amid others also by their load (`Target.load`).
    """
    power = fitted(target, "power")
    alone = busy / (busy + power["after"]) * (1 / sustained - 1)
    return busy * (1 + max(alone, target.load * (1 / power["sustained"] - 1)))


def least_rows(target: Target) -> int:
    """Rows of the smallest tile of the matrix units; fewer rows cost as much."""
    return int(fitted(target, "tile")["rows"])


@lru_cache(maxsize=4096)
def best_tile(rows: int, columns: int, groups: int, cores: int, heights: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width and number of waves of the tiles that a tuned library takes for `groups` products.

    Fewest waves first, then the fullest last wave, then the narrower tile: the rule of DeepGEMM's heuristics; no tile
    twice as high as the rows, nor wider than the columns. Widths above 128 need a row of scales each, and tiles above
    128 x 160 do not fit the registers.
    """
    best: tuple[int, int, int, int] | None = None
    for height in heights:
        if height > heights[0] and height >= 2 * rows:
            continue
        for width in (*range(16, 129, 8), 144, 160):
            if (height > 128 and width > 128) or (width > 16 and width - 8 >= columns):
                continue
            tiles = ceildiv(rows, height) * ceildiv(columns, width) * groups
            waves, last = ceildiv(tiles, cores), tiles % cores or cores
            if best is None or _better((height, width, waves, last), best):
                best = (height, width, waves, last)
    assert best is not None
    return best[:3]


def _better(new: tuple[int, int, int, int], old: tuple[int, int, int, int]) -> bool:
    if (new[2], -new[3]) != (old[2], -old[3]):
        return (new[2], -new[3]) < (old[2], -old[3])
    if new[0] == old[0]:
        return new[1] < old[1]
    return new[1] > old[1] if new[1] != old[1] else new[0] < old[0]
