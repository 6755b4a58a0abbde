"""Layers over pipeline stages: who computes what, and what a step of the slowest stage means for a token.

In serving, as many micro-batches are under way as there are stages: every device computes all the time, and a token
passes all stages. Its time is the number of stages times that of the slowest, so the rate of a device is that of a
step without stages, less their unevenness and the sends between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moec.ir import Module
from moec.passes.planning.timing import functions_of
from moec.targets import Target
from moec.targets.cost import op_time


def split_layers(costs: Sequence[float], stages: int) -> list[int]:
    """Layers of each of `stages` stages, in order and at least one each, so that the costliest costs least."""
    low, high = max(costs), sum(costs)
    best = _fill(costs, stages, high)
    for _ in range(60):
        middle = (low + high) / 2
        found = _fill(costs, stages, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    assert best is not None
    return best


def _fill(costs: Sequence[float], stages: int, limit: float) -> list[int] | None:
    """As many layers a stage as fit under `limit`, one left for each later stage; None where layers remain."""
    counts, start = [], 0
    for stage in range(stages):
        after = stages - stage - 1
        total, end = 0.0, start
        while end < len(costs) - after and (end == start or total + costs[end] <= limit * (1 + 1e-12)):
            total += costs[end]
            end += 1
        counts.append(end - start)
        start = end
    return counts if start == len(costs) else None


def layer_times(module: Module, phase: str, segments: Mapping[str, float]) -> list[float]:
    """Microseconds of each layer, in order; what is outside the layers goes to the last, where the head is.

    `segments`: of a whole step, by function, as `StepCost` has them.
    """
    (entry, _), *layers = functions_of(module, phase)
    count: dict[str, int] = {}
    for function, calls in layers:
        count[function.name] = count.get(function.name, 0) + calls
    times = [segments[f.name] / count[f.name] for f, calls in layers for _ in range(calls)]
    times[-1] += segments[entry.name]
    return times


def pipelined_us(times: Sequence[float], stages: int, send_us: float) -> float:
    """Microseconds of a token through `stages` stages that are all busy."""
    if stages == 1:
        return sum(times)
    start, slowest = 0, 0.0
    for count in split_layers(times, stages):
        slowest = max(slowest, sum(times[start : start + count]))
        start += count
    return stages * (slowest + send_us)


def send_us(target: Target, size: float, stage_ranks: int) -> float:
    """Microseconds to hand `size` bytes of one device to the next stage, on another node unless stages share one."""
    across = stage_ranks * 2 > target.node.devices
    return op_time({"op": "send", "bytes": round(size), "across": across}, target).time_us
