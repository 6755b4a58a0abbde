"""Rotary embedding of a `config.json`: `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moec.errors import near

FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"alpha", "factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim",
            "original_max_position_embeddings", "truncate",
        }
    ),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "longrope": frozenset(
        {
            "attention_factor", "factor", "long_factor", "long_mscale", "original_max_position_embeddings",
            "short_factor", "short_mscale",
        }
    ),
}  # fmt: skip
"""The kinds of rotary embedding, and the fields of each besides theta and the share of rotated dims."""
EVERYWHERE = frozenset({"partial_rotary_factor", "rope_theta"})
LARGEST = 1e18
"""What numbers of rotary embeddings stay below: far beyond any, and powers of them are still numbers."""
Fail = Callable[[str], Exception]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of `dims` dims of a head; the numbers are those of `weight.rope_table`.

    `softmax`: factor on attention scores.
    """

    theta: float = 10000.0
    factor: float = 1.0
    original: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float = 1.0
    softmax: float = 1.0
    truncate: bool = True
    dims: int = 0
    interleaved: bool = False
    method: str = "yarn"
    factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()
    short_attention: float = 1.0


def table_attrs(r: Rope, positions: int, dims: int | None = None) -> dict[str, Any]:
    """Attributes of the `weight.rope_table` of a rotary embedding."""
    attrs: dict[str, Any] = {"positions": positions, "dims": dims or r.dims}
    attrs |= {k: getattr(r, k) for k in ("theta", "factor", "original", "beta_fast", "beta_slow")}
    attrs |= {"attention": r.attention, "truncate": r.truncate}
    attrs |= {"method": r.method} if r.method != "yarn" else {}
    if r.method == "factors":
        attrs |= {"factors": r.factors, "short_factors": r.short_factors, "short_attention": r.short_attention}
    return attrs


def rope_of(
    raw: Mapping[str, Any],
    positions: int,
    fail: Fail,
    head_dim: int = 0,
    interleaved: bool = False,
    kinds: tuple[str, ...] = ("default", "yarn"),
    theta: float = 10000.0,
) -> Rope:
    """The rotary embedding of a `config.json` for a model of `positions`; raises what `fail` makes of a message.

    `kinds` are those that the family supports, `theta` its base where none is given. With a `head_dim` the embedding
    may turn a part of it (`partial_rotary_factor`); without, the family's own fields give its dims.
    """
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise fail(f"the rope fields must be an object, got {given!r}")
    given = {key: value for key, value in given.items() if value is not None}
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    kind = "longrope" if kind == "su" else kind
    given.pop("type", None)
    given = {"rope_theta": raw.get("rope_theta") or theta, **given}
    if kind not in kinds:
        known = " and ".join((", ".join(kinds[:-1]), kinds[-1])) if len(kinds) > 1 else kinds[0]
        raise fail(f"rope type {kind!r} is not supported, only {known}{near(str(kind), list(kinds))}")
    for key, value in given.items():
        if key not in FIELDS[kind] | EVERYWHERE and value:
            raise fail(f"rope field {key!r} is not known{near(key, sorted(FIELDS[kind] | EVERYWHERE))}")
    part = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    part = 1.0 if part is None else _number({"partial_rotary_factor": part}, "partial_rotary_factor", None, fail)
    if part != 1.0 and not head_dim:
        raise fail("partial_rotary_factor other than 1 is not supported")
    dims = int(head_dim * part)
    if head_dim and (dims < 2 or dims % 2 or dims > head_dim):
        raise fail(f"rotary dims must be even and within the head, {part:g} of {head_dim} are {dims}")
    base = {"theta": _number(given, "rope_theta", None, fail), "dims": dims, "interleaved": interleaved}
    return _KINDS[kind](given, base, positions, fail)


def _default(given: Mapping[str, Any], base: dict[str, Any], positions: int, fail: Fail) -> Rope:
    return Rope(**base)


def _linear(given: Mapping[str, Any], base: dict[str, Any], positions: int, fail: Fail) -> Rope:
    return Rope(**base, method="linear", factor=_number(given, "factor", None, fail))


def _dynamic(given: Mapping[str, Any], base: dict[str, Any], positions: int, fail: Fail) -> Rope:
    """Within the model's positions the base does not change; a given `alpha` changes it for all (Hunyuan)."""
    if given.get("alpha"):
        dims = base["dims"]
        if dims <= 2:
            raise fail(f"rope field alpha needs more than 2 rotary dims, these are {dims}")
        base["theta"] *= _number(given, "alpha", None, fail) ** (dims / (dims - 2))
    return Rope(**base)


def _llama3(given: Mapping[str, Any], base: dict[str, Any], positions: int, fail: Fail) -> Rope:
    low, high = (_number(given, key, None, fail) for key in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise fail(f"rope field high_freq_factor must be above low_freq_factor, got {high:g} and {low:g}")
    original = int(_number(given, "original_max_position_embeddings", positions, fail))
    factor = _number(given, "factor", None, fail)
    return Rope(**base, method="llama3", factor=factor, original=original, beta_slow=low, beta_fast=high)


def _longrope(given: Mapping[str, Any], base: dict[str, Any], positions: int, fail: Fail) -> Rope:
    original = int(_number(given, "original_max_position_embeddings", positions, fail))
    factor = _number(given, "factor", positions / original, fail)
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scale = _number(given, "attention_factor", scale, fail)
    factors = {key: _numbers(given, key, base["dims"] // 2, fail) for key in ("long_factor", "short_factor")}
    return Rope(
        **base,
        method="factors",
        original=original,
        factors=factors["long_factor"],
        short_factors=factors["short_factor"],
        attention=_number(given, "long_mscale", scale, fail),
        short_attention=_number(given, "short_mscale", scale, fail),
    )


def _yarn(given: Mapping[str, Any], base: dict[str, Any], positions: int, fail: Fail) -> Rope:
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
        **base,
        factor=factor,
        original=original,
        beta_fast=_number(given, "beta_fast", 32.0, fail),
        beta_slow=_number(given, "beta_slow", 1.0, fail),
        attention=_number(given, "attention_factor", attention, fail),
        softmax=_mscale(factor, m_all) ** 2 if m_all else 1.0,
        truncate=truncate,
    )


_KINDS: Mapping[str, Callable[[Mapping[str, Any], dict[str, Any], int, Fail], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _mscale(factor: float, m: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def _number(given: Mapping[str, Any], key: str, default: float | None, fail: Fail) -> float:
    """A positive number of the rope fields; null and 0 stand for the default where there is one."""
    value = given.get(key)
    if default is not None and not value:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST:
        raise fail(f"rope field {key} must be a positive number below {LARGEST:g}, got {value!r}")
    return float(value)


def _numbers(given: Mapping[str, Any], key: str, count: int, fail: Fail) -> tuple[float, ...]:
    values = given.get(key)
    if not isinstance(values, list) or len(values) != count:
        raise fail(f"rope field {key} must be a list of {count} numbers")
    return tuple(_number({key: v}, key, None, fail) for v in values)
