"""Change one number of a target: `nvlink=2x`, `memory_bandwidth=0.1x`, `scale_out=800 Gb/s`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from moec.errors import near
from moec.passes.planning.errors import WrongWhatIf
from moec.targets import Link, Target
from moec.targets.units import parse

Change = Callable[[float], float]


@dataclass(frozen=True)
class Knob:
    """A number of a target: what it is, its dimension, and the target with that number changed."""

    doc: str
    dimension: str
    apply: Callable[[Target, Change], Target]


def _memory_bandwidth(target: Target, change: Change) -> Target:
    device = target.device
    return replace(target, device=replace(device, memory_bandwidth=change(device.memory_bandwidth)))


def _memory_bytes(target: Target, change: Change) -> Target:
    device = target.device
    return replace(target, device=replace(device, memory_bytes=change(device.memory_bytes)))


def _rates(*types: str) -> Callable[[Target, Change], Target]:
    def apply(target: Target, change: Change) -> Target:
        rates: Mapping[str, float] = target.device.matrix_rates
        missing = [t for t in types if t not in rates]
        if missing:
            raise WrongWhatIf(spec=f"{missing[0]}_rate", message=f"{target.name} has no {missing[0]} matrix rate")
        new = {t: change(r) if not types or t in types else r for t, r in rates.items()}
        return replace(target, device=replace(target.device, matrix_rates=new))

    return apply


def _bandwidth(link: Link, change: Change) -> Link:
    return replace(link, bandwidth=change(link.bandwidth))


def _latency(link: Link, change: Change) -> Link:
    return replace(link, latency=change(link.latency))


def _inside(number: Callable[[Link, Change], Link]) -> Callable[[Target, Change], Target]:
    return lambda t, change: replace(t, node=replace(t.node, scale_up=number(t.scale_up(), change)))


def _between(number: Callable[[Link, Change], Link]) -> Callable[[Target, Change], Target]:
    return lambda t, change: replace(t, node=replace(t.node, scale_out=number(t.scale_out(), change)))


_UP = Knob("link inside a node, one way per device", "bandwidth", _inside(_bandwidth))
_OUT = Knob("network between nodes, one way per adapter", "bandwidth", _between(_bandwidth))

KNOBS: Mapping[str, Knob] = {
    "memory_bandwidth": Knob("device memory", "bandwidth", _memory_bandwidth),
    "memory": Knob("capacity of device memory", "bytes", _memory_bytes),
    "matrix_rate": Knob("all matrix units together (a factor only)", "ratio", _rates()),
    "fp8_rate": Knob("FP8 matrix units", "rate", _rates("fp8")),
    "bf16_rate": Knob("BF16 matrix units", "rate", _rates("bf16")),
    "scale_up": _UP,
    "nvlink": _UP,
    "scale_out": _OUT,
    "network": _OUT,
    "scale_up_latency": Knob("latency inside a node", "time", _inside(_latency)),
    "scale_out_latency": Knob("latency between nodes", "time", _between(_latency)),
}
"""What `--what-if` can change, by name; `nvlink` and `network` are other names of the two links."""

TRIED = ("memory_bandwidth", "matrix_rate", "scale_up", "scale_out")
"""Numbers that the planner doubles, one at a time, to say which would help most."""


def changed(target: Target, text: str) -> Target:
    """The target with `KEY=VALUE` applied: a factor (`2x`) or a quantity with its unit; WrongWhatIf or NoLink."""
    key, equals, value = text.partition("=")
    if not equals or not value.strip():
        raise WrongWhatIf(spec=text, message="write KEY=VALUE, such as nvlink=2x")
    key = key.strip()
    if key not in KNOBS:
        raise WrongWhatIf(spec=text, message=f"unknown {key!r}{near(key, list(KNOBS))}")
    knob = KNOBS[key]
    new = knob.apply(target, _change(text, value.strip(), knob))
    return replace(new, name=f"{target.name} with {key}={value.strip()}")


def doubled(target: Target, key: str) -> Target:
    """The target with one number doubled."""
    return KNOBS[key].apply(target, lambda old: 2 * old)


def _change(text: str, value: str, knob: Knob) -> Change:
    try:
        if value[-1] in "xX":
            factor = float(value[:-1])
            number = factor
        elif knob.dimension == "ratio":
            raise ValueError("takes a factor, such as 2x")
        else:
            number, factor = parse(value, knob.dimension), math.nan
    except ValueError as error:
        reason = "is no factor such as 2x" if str(error).startswith("could not convert") else str(error)
        raise WrongWhatIf(spec=text, message=reason) from None
    if not (math.isfinite(number) and number > 0):
        raise WrongWhatIf(spec=text, message="the value must be positive and finite")
    return (lambda old: number) if math.isnan(factor) else (lambda old: old * factor)
