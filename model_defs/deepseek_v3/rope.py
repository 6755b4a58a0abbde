"""Rotary embedding of the family, read from `rope_parameters` or from the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moec.errors import near

YARN = frozenset(
    {
        "attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim",
        "original_max_position_embeddings", "partial_rotary_factor", "truncate",
    }
)  # fmt: skip

Fail = Callable[[str], Exception]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: plain, or YaRN (Peng et al. 2023) when `factor` is above 1."""

    theta: float = 10000.0
    factor: float = 1.0
    original: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float = 1.0
    softmax: float = 1.0
    truncate: bool = True


def rope_of(raw: Mapping[str, Any], positions: int, fail: Fail) -> Rope:
    """The rotary embedding of a `config.json` for a model of `positions`; raises what `fail` makes of a message."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise fail(f"the rope fields must be an object, got {given!r}")
    given = {key: value for key, value in given.items() if value is not None}
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    given = {"rope_theta": raw.get("rope_theta") or 10000.0, **given}
    theta = _number(given, "rope_theta", None, fail)
    del given["rope_theta"]
    if kind == "default":
        return Rope(theta)
    if kind != "yarn":
        raise fail(f"rope type {kind!r} is not supported, only default and yarn")
    for key in given:
        if key not in YARN:
            raise fail(f"rope field {key!r} is not known{near(key, sorted(YARN))}")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise fail("partial_rotary_factor other than 1 is not supported")
    return _yarn(given, theta, positions, fail)


def _yarn(given: Mapping[str, Any], theta: float, positions: int, fail: Fail) -> Rope:
    original = int(_number(given, "original_max_position_embeddings", positions, fail))
    if original < 1:
        raise fail("rope field original_max_position_embeddings must be a positive integer")
    factor = _number(given, "factor", positions / original, fail)
    m, m_all = given.get("mscale") or 0, given.get("mscale_all_dim") or 0
    m, m_all = (_number({"mscale": v}, "mscale", None, fail) if v else 0.0 for v in (m, m_all))
    attention = _mscale(factor, m) / _mscale(factor, m_all) if m and m_all else _mscale(factor, 1.0)
    truncate = given.get("truncate", True)
    if not isinstance(truncate, bool):
        raise fail(f"rope field truncate must be true or false, got {truncate!r}")
    return Rope(
        theta=theta,
        factor=factor,
        original=original,
        beta_fast=_number(given, "beta_fast", 32.0, fail),
        beta_slow=_number(given, "beta_slow", 1.0, fail),
        attention=_number(given, "attention_factor", attention, fail),
        softmax=_mscale(factor, m_all) ** 2 if m_all else 1.0,
        truncate=truncate,
    )


def _mscale(factor: float, m: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def _number(given: Mapping[str, Any], key: str, default: float | None, fail: Fail) -> float:
    """A positive number of the rope fields; null and 0 stand for the default where there is one."""
    value = given.get(key)
    if default is not None and not value:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < sys.float_info.max:
        raise fail(f"rope field {key} must be a positive number, got {value!r}")
    return float(value)
