"""Measures other tiles of an artifact's kernels on the GPU here, each in its own launch of the program."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from moec.codegen.triton import aot, tiles
from moec.codegen.triton.errors import CompileFailed
from moec.codegen.triton.program import Program, lower_module
from moec.codegen.triton.spec import Instance, Tile
from moec.ir import Module
from moec.runtime.cuda.engine import GpuEngine
from moec.runtime.cuda.kernel import Kernel
from moec.runtime.cuda.program import GpuEntry
from moec.targets import Target

WARM_UP = 3


@dataclass(frozen=True)
class Result:
    """Microseconds of a kernel with the tile that was chosen for it and with the fastest, and how many were tried."""

    name: str
    declared: float
    best: float
    tile: Tile
    tried: int


def tune(
    engine: GpuEngine,
    module: Module,
    target: Target,
    limits: Mapping[str, int],
    source: str,
    repeats: int = 20,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[Mapping[str, tuple[Instance, tiles.Measured]]], None] = lambda won: None,
    late: Callable[[], bool] = lambda: False,
) -> tuple[list[Result], dict[str, tiles.Measured]]:
    """Try other tiles of every kernel of the program that has blocks to choose, at the largest batch.

    Returns what was measured, and the entries for `tiles.save`: the kernels for which another tile won. A turn tries
    one tile of each kernel; its winners go to `keep` as well, so that a crash loses little, and none begins once it is
    `late`. A tile that does not compile or fails its checks is passed over. Raises DriverFailed.
    """
    base = lower_module(module, target, limits, tiles={})
    launches = _first_launches(base)
    tries = {key: list(tiles.candidates(place.instance, target)) for key, place in launches.items()}
    best = {key: (place.instance, us) for key, place in launches.items()
            if (us := _times(engine, base, {key: place}, repeats).get(key)) is not None}  # fmt: skip
    chosen_us = {key: us for key, (_, us) in best.items()}
    tried = dict.fromkeys(best, 0)
    for turn in range(max(map(len, tries.values()), default=0)):
        if late():
            say(f"out of time: {turn} of {max(map(len, tries.values()))} turns")
            break
        now = {key: others[turn] for key, others in tries.items() if turn < len(others) and key in best}
        forced = {key: tiles.Measured(other.tile, 0.0, 0.0, source) for key, other in now.items()}
        program = lower_module(module, target, limits, tiles=forced)
        places = {key: replace(launches[key], instance=other) for key, other in now.items()}
        won: dict[str, tuple[Instance, tiles.Measured]] = {}
        for key, us in _times(engine, program, places, repeats).items():
            tried[key] += 1
            if us < best[key][1]:
                best[key] = now[key], us
                won[key] = now[key], tiles.Measured(now[key].tile, us, chosen_us[key], source)
        keep(won)
        say(f"turn {turn + 1}: {len(now)} tiles, {len(won)} of them the fastest of their kernel so far")
    results, found = [], {}
    for key, (instance, us) in best.items():
        name = launches[key].name
        say(f"{name}: {chosen_us[key]:.1f} us as chosen, {us:.1f} us the best of {tried[key]} others")
        results.append(Result(name, chosen_us[key], us, instance.tile, tried[key]))
        if instance is not launches[key].instance:
            found[key] = tiles.Measured(instance.tile, us, chosen_us[key], source)
    return results, found


@dataclass(frozen=True)
class _Place:
    """The first launch of a kernel at some sizes: in which phase, the how manyth, and the kernel's name."""

    phase: str
    number: int
    name: str
    instance: Instance


def _first_launches(program: Program) -> dict[str, _Place]:
    """By `tiles.key_of`, of kernels that have blocks to choose."""
    found: dict[str, _Place] = {}
    for phase, lowered in program.phases.items():
        for number, (_, _, instance) in enumerate(_launches(lowered.steps, program)):
            if any(block in instance.tile.constants for block in tiles.BLOCKS):
                found.setdefault(tiles.key_of(instance), _Place(phase, number, instance.name, instance))
    return found


def _times(engine: GpuEngine, program: Program, places: Mapping[str, _Place], repeats: int) -> dict[str, float]:
    """Median microseconds of launches by key, without those whose kernel does not compile or fails its checks."""
    compiled = aot.try_compile([p.instance for p in places.values()], jobs=len(os.sched_getaffinity(0)))
    steps = {phase: list(_launches(p.steps, program)) for phase, p in program.phases.items()}
    found = {}
    for (key, place), kernel in zip(places.items(), compiled, strict=True):
        if isinstance(kernel, CompileFailed) or kernel.problems():
            continue
        name, step, _ = steps[place.phase][place.number]
        bounds = program.bounds[place.phase]
        entry = GpuEntry(place.phase, (step,), bounds["T"], bounds["R"], bounds["B"])
        loaded = {name: Kernel(engine.driver, kernel.record(name), kernel.binary)}
        timed_us = engine.timer(entry, loaded, bounds)
        for _ in range(WARM_UP):
            timed_us()
        found[key] = median(timed_us() for _ in range(repeats))
    return found


def _launches(steps: list[Any], program: Program) -> Iterator[tuple[str, Mapping[str, Any], Instance]]:
    """Every launch with its kernel's name and sizes; one inside a loop as a loop over the first layer alone."""
    for step in steps:
        if "repeat" in step:
            first = step["repeat"][0]
            for name, inner, instance in _launches(step["steps"], program):
                yield name, {"repeat": [first, first], "steps": [inner]}, instance
        elif "kernel" in step:
            instance = program.table.entries[step["kernel"]].instance
            sizes = {n: v for n, v in step["arguments"].items() if n in tiles.SIZES and isinstance(v, int)}
            yield step["kernel"], step, replace(instance, dims={**instance.dims, **sizes})
