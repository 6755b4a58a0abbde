"""Running an artifact's profiled program and reading its ticks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec import targets
from moec.codegen.tvm.compile import compile_watched
from moec.errors import InputError
from moec.ir import Module, parse_module
from moec.ir.cost import op_cost, phase_sizes
from moec.runtime import Model
from moec.runtime.engine import Call, Engine
from moec.runtime.library import Library
from moec.runtime.memory import Memory
from moec.runtime.plan import Argument, parse_entry
from moec.targets.detect import measure_read_bandwidth


class NoProfile(InputError):
    """An artifact whose steps are not made of profiled CPU programs."""

    template = "{path}: --profile times the ops of CPU artifacts; this one runs on a GPU"


@dataclass(frozen=True)
class OpTime:
    """One op of a phase over all its layers: microseconds of a step (median over steps), and the least it could take.

    `predicted_us`: the greater of its bytes at the measured read bandwidth and its operations at the target's FP32
    rate. `calls`: how often it runs in a step.
    """

    function: str
    op: int
    name: str
    result: str
    calls: int
    us: float
    predicted_us: float


@dataclass(frozen=True)
class Span:
    """An op of the median step: where it stands in time."""

    name: str
    layer: int | None
    start_us: float
    us: float


@dataclass(frozen=True)
class Profile:
    """A phase: its ops, slowest first, one step's timeline, and the wall time of a profiled and of a plain step."""

    phase: str
    tokens: int
    context: int
    ops: tuple[OpTime, ...]
    spans: tuple[Span, ...]
    step_us: float
    plain_step_us: float
    bandwidth: float
    peak: float

    def as_json(self) -> dict[str, Any]:
        """For `moec bench --profile --json`; the timeline goes into the trace alone."""
        return {k: v for k, v in asdict(self).items() if k != "spans"}


def profile(model: Model, phase: str, context: int, repeat: int = 8) -> Profile:
    """Profile `repeat` decode steps at `context` cached tokens, or as many prefills of `context` tokens, one chunk.

    Raises NoProfile, CompilerFailed, NoCompiler.
    """
    artifact, engine = model.artifact, model.engine
    if not isinstance(engine, Engine):
        raise NoProfile(path=artifact.path)
    module = parse_module((artifact.path / "program.ir").read_text(), str(artifact.path / "program.ir"))
    target = targets.load("cpu")
    watched = compile_watched(module, target, artifact.manifest.limits, "ticks")
    library = Library(watched.library, engine.threads)
    described = watched.phases[phase]
    tokens = 1 if phase == "decode" else context
    samples, walls, plain = _run(model.vocab, engine, library, described["entry"], phase, context, repeat)
    rate = median((s[-1] - s[0]) / w for s, w in zip(samples, walls, strict=True)) / 1e6
    best = samples[int(np.argsort(walls)[len(walls) // 2])]
    points = described["points"]
    spans = tuple(
        Span(
            p["name"],
            p["layer"],
            (best[p["word"] - 1] - best[0]) / rate,
            (best[p["word"]] - best[p["word"] - 1]) / rate,
        )
        for p in points
    )
    bandwidth = measure_read_bandwidth(library.threads)
    peak = target.device.vector_rate * library.threads / float(target.device.cores)
    ops = _ops(module, points, np.median([np.diff(s) for s in samples], axis=0) / rate, phase, context, bandwidth, peak)
    return Profile(phase, tokens, context, ops, spans, median(walls) * 1e6, plain * 1e6, bandwidth, peak)


def _run(
    vocab: int, engine: Engine, library: Library, entry: dict[str, Any], phase: str, context: int, repeat: int
) -> tuple[list[NDArray[np.int64]], list[float], float]:
    """Ticks and seconds of every profiled call, and the median seconds of a plain one."""
    parsed = parse_entry(entry)
    memory = Memory([a for a in parsed.args if a.kind in ("cache", "workspace")])

    def fixed(arg: Argument) -> NDArray[np.generic]:
        return engine.weights.view(arg) if arg.kind == "weight" else memory.view(arg)

    call = Call(parsed, 1 if phase == "prefill" else engine.batch, engine.pool.table_width, library, fixed)
    ids = np.random.default_rng(0).integers(0, vocab, context + 1)
    tokens = context if phase == "prefill" else 1
    samples: list[NDArray[np.int64]] = []
    walls: list[float] = []
    plain: list[float] = []
    for target, kept in ((call, walls), (engine.call(phase), plain)):
        arrays, args = target.bind(tokens=tokens, rows=1, sequences=1)
        length = context if phase == "prefill" else context + 1
        for i in range(repeat + 2):
            arrays["ids"][:] = ids[:tokens] if phase == "prefill" else ids[(context + i) % len(ids)]
            arrays["seq"][:] = 0
            arrays["pos"][:] = np.arange(length - tokens, length)
            arrays["pages"][0] = np.arange(engine.pool.table_width)
            arrays["starts"][:] = (0, length)
            arrays["rows"][:] = tokens - 1
            library.use_threads()
            start = perf_counter()
            target.function(*args)
            if i >= 2:
                kept.append(perf_counter() - start)
                if target is call:
                    samples.append(arrays["ticks"].copy())
    return samples, walls, median(plain)


def _ops(
    module: Module, points: list[dict[str, Any]], us: Any, phase: str, context: int, bandwidth: float, peak: float
) -> tuple[OpTime, ...]:
    total: dict[tuple[str, int], float] = defaultdict(float)
    calls: dict[tuple[str, int], int] = defaultdict(int)
    for point in points:
        key = (point["function"], point["op"])
        total[key] += float(us[point["word"] - 1])
        calls[key] += 1
    sizes = phase_sizes(phase, 1, context, context)
    out = []
    for (function, index), microseconds in total.items():
        op = module.functions[function].ops[index]
        cost = op_cost(op, sizes)
        least = max((cost.bytes_read + cost.bytes_written) / bandwidth, cost.flops / peak) * 1e6
        count = calls[function, index]
        shown = str(op.results[0].type) if op.results else ""
        out.append(OpTime(function, index, op.name, shown, count, microseconds, least * count))
    return tuple(sorted(out, key=lambda o: -o.us))
