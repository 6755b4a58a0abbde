"""Measures other tiles of an artifact's kernels on the GPU here, each in its own launch of the program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from moec.codegen.triton import aot, tiles
from moec.codegen.triton.errors import CheckFailed, CompileFailed
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
    """Microseconds of a kernel with the declared tile and with the fastest, and how many others were tried."""

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
) -> tuple[list[Result], dict[str, tiles.Measured]]:
    """Try other tiles of every kernel of the program that has blocks to choose, at the largest batch.

    Returns what was measured, and the entries for `tiles.save`: the kernels for which another tile won. A tile that
    does not compile or fails its checks is passed over. Raises DriverFailed.
    """
    base = lower_module(module, target, limits, tiles={})
    results, found = [], {}
    for name, entry in base.table.entries.items():
        instance = entry.instance
        if not any(block in instance.tile.constants for block in tiles.BLOCKS):
            continue
        declared = _time(engine, base, name, instance, repeats)
        best, fastest, tried = declared, instance, 0
        for other in tiles.candidates(instance):
            program = lower_module(module, target, limits, tiles={tiles.key_of(instance): other.tile})
            try:
                us = _time(engine, program, name, other, repeats)
            except (CompileFailed, CheckFailed):
                continue
            tried += 1
            if us < best:
                best, fastest = us, other
        say(f"{name}: {declared:.1f} us as declared, {best:.1f} us the best of {tried} others")
        results.append(Result(name, declared, best, fastest.tile, tried))
        if fastest is not instance:
            found[tiles.key_of(instance)] = tiles.Measured(fastest.tile, best, declared, source)
    return results, found


def _time(engine: GpuEngine, program: Program, name: str, instance: Instance, repeats: int) -> float:
    """Median microseconds of the first launch of a kernel in the program."""
    (compiled,) = aot.compile_kernels([instance], jobs=1)
    kernel = Kernel(engine.driver, compiled.record(name), compiled.binary)
    phase, step = next(
        (p, s) for p, lowered in program.phases.items() for n, s in _launches(lowered.steps) if n == name
    )
    bounds = program.bounds[phase]
    entry = GpuEntry(phase, (step,), bounds["T"], bounds["R"], bounds["B"])
    timed_us = engine.timer(entry, {name: kernel}, bounds)
    for _ in range(WARM_UP):
        timed_us()
    return median(timed_us() for _ in range(repeats))


def _launches(steps: list[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every launch with its kernel's name; one inside a loop as a loop over the first layer alone."""
    for step in steps:
        if "repeat" in step:
            first = step["repeat"][0]
            for name, inner in _launches(step["steps"]):
                yield name, {"repeat": [first, first], "steps": [inner]}
        elif "kernel" in step:
            yield step["kernel"], step
