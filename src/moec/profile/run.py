"""Running an artifact's profiled program and reading its ticks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
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
from moec.profile.op_rows import Call as StepCall
from moec.profile.op_rows import op_rows
from moec.runtime import Model
from moec.runtime.engine import Call, Engine
from moec.runtime.errors import WrongOption
from moec.runtime.library import Library
from moec.runtime.memory import Memory
from moec.runtime.plan import Argument, parse_entry
from moec.targets import Target
from moec.targets.cost import op_time
from moec.targets.read_bandwidth import measure_read_bandwidth

_PRODUCTS = ("linear", "linear.heads", "moe.experts")


class NoProfile(InputError):
    """An artifact whose steps are not made of profiled CPU programs."""

    template = "{path}: --profile times the ops of CPU artifacts; this one runs on a GPU"


@dataclass(frozen=True)
class OpTime:
    """One op of a phase over all its layers: microseconds of a step (median over steps), beside two predictions.

    `bound_us`: the greater of its bytes at the measured read bandwidth and its operations at the peak of the units
    that can do them. `predicted_us`: the target's cost model, for a machine that reads with the measured bandwidth;
    None where it has no answer. `calls`: how often it runs in a step.
    """

    function: str
    op: int
    name: str
    result: str
    calls: int
    us: float
    bound_us: float
    predicted_us: float | None


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
    product_peak: float

    def as_json(self) -> dict[str, Any]:
        """For `moec bench --profile --json`; the timeline goes into the trace alone."""
        return {k: v for k, v in asdict(self).items() if k != "spans"}


def profile(model: Model, phase: str, context: int, repeat: int = 8) -> Profile:
    """Profile `repeat` decode steps at `context` cached tokens, or as many prefills of `context` tokens, one chunk.

    Raises NoProfile, WrongOption, CompilerFailed, NoCompiler.
    """
    artifact, engine = model.artifact, model.engine
    if not isinstance(engine, Engine):
        raise NoProfile(path=artifact.path)
    if repeat < 1:
        raise WrongOption(option="repeat", expected="at least 1", value=repeat)
    # A decode step takes a place behind those that are cached; a prefill is one chunk.
    most = model.context - 1 if phase == "decode" else engine.chunk
    if not 1 <= context <= most:
        raise WrongOption(option="prompt-tokens", expected=f"1 to {most}, as compiled", value=context)
    module = parse_module((artifact.path / "program.ir").read_text(encoding="utf-8"), str(artifact.path / "program.ir"))
    target = targets.load("cpu")
    watched = compile_watched(module, target, artifact.manifest.limits, "ticks")
    library = Library(watched.library, engine.threads)
    described = watched.phases[phase]
    tokens = 1 if phase == "decode" else context
    before = measure_read_bandwidth(library.threads)
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
    bandwidth = (before + measure_read_bandwidth(library.threads)) / 2
    machine = _as_measured(target, library.threads, bandwidth)
    us = np.median([np.diff(s) for s in samples], axis=0) / rate
    ops = _ops(module, points, us, call_of(module, phase, tokens, context), machine)
    return Profile(
        phase, tokens, context, ops, spans, median(walls) * 1e6, plain * 1e6, bandwidth, machine.device.vector_rate,
        product_peak(machine, tokens),
    )  # fmt: skip


def call_of(module: Module, phase: str, tokens: int, context: int) -> StepCall:
    """One call of a phase of `module`."""
    top_k = next((op.attrs["top_k"] for _, op in module.ops() if op.name == "moe.route"), 1)
    return StepCall(phase, tokens, context, int(str(top_k)))


def _as_measured(target: Target, threads: int, bandwidth: float) -> Target:
    """The target with as many cores as threads run, and the bandwidth that they were seen to read with."""
    part = threads / float(target.device.cores)
    rates = {name: rate * part for name, rate in target.device.matrix_rates.items()}
    device = replace(
        target.device, cores=threads, vector_rate=target.device.vector_rate * part, matrix_rates=rates,
        memory_bandwidth=bandwidth,
    )  # fmt: skip
    return replace(target, device=device)


def product_peak(target: Target, tokens: int) -> float:
    """Operations a second of products with `tokens` rows: matrix tiles, where there are some, take BF16 numbers and
    multiply both halves of an activation."""
    from moec.codegen.tvm.blocking import MOST_ROWS_BESIDE_TILES

    device = target.device
    if "amx_bf16" not in device.isa or tokens <= MOST_ROWS_BESIDE_TILES:
        return device.vector_rate
    return max(device.vector_rate, device.matrix_rate("bf16") / 2)


def _run(
    vocab: int, engine: Engine, library: Library, entry: dict[str, Any], phase: str, context: int, repeat: int
) -> tuple[list[NDArray[np.int64]], list[float], float]:
    """Ticks and seconds of every profiled call, and the median seconds of a plain one."""
    parsed = parse_entry(entry)
    memory = Memory([a for a in parsed.args if a.kind in ("cache", "workspace")])
    for arg in parsed.args:
        if arg.kind == "cache":
            _touch(memory.view(arg))
            _touch(engine.memory.view(arg))

    def fixed(arg: Argument) -> NDArray[np.generic]:
        return engine.weights.view(arg) if arg.kind == "weight" else memory.view(arg)

    call = Call(parsed, 1 if phase == "prefill" else engine.batch, engine.pool.table_width, library, fixed)
    ids = np.random.default_rng(0).integers(0, vocab, context + 1)
    tokens = context if phase == "prefill" else 1
    samples: list[NDArray[np.int64]] = []
    walls: list[float] = []
    plain: list[float] = []
    bound = ((call, walls), (engine.call(phase), plain))
    length = context if phase == "prefill" else context + 1
    both = [(c, *c.bind(tokens=tokens, rows=1, sequences=1), kept) for c, kept in bound]
    # In turns, so that what else the machine does falls on both.
    for i in range(repeat + 2):
        for number, (target, arrays, args, kept) in enumerate(both):
            # Another token each time: the experts of the last one may still lie in a cache.
            arrays["ids"][:] = ids[:tokens] if phase == "prefill" else ids[(context + 2 * i + number) % len(ids)]
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


def _touch(cache: NDArray[np.generic]) -> None:
    """Write small numbers of whatever type: memory that was never written is one page of zeros, which no one has to
    fetch."""
    cache.view(np.uint8).fill(0x3C)


def _ops(module: Module, points: list[dict[str, Any]], us: Any, call: StepCall, target: Target) -> tuple[OpTime, ...]:
    total: dict[tuple[str, int], float] = defaultdict(float)
    calls: dict[tuple[str, int], int] = defaultdict(int)
    for point in points:
        key = (point["function"], point["op"])
        total[key] += float(us[point["word"] - 1])
        calls[key] += 1
    sizes = phase_sizes(call.phase, 1, call.context, call.context)
    products = product_peak(target, call.tokens)
    out = []
    for (function, index), microseconds in total.items():
        op = module.functions[function].ops[index]
        cost = op_cost(op, sizes)
        peak = products if op.name in _PRODUCTS else target.device.vector_rate
        least = max((cost.bytes_read + cost.bytes_written) / target.device.memory_bandwidth, cost.flops / peak) * 1e6
        count = calls[function, index]
        rows = list(op_rows(op, call, surely=False))
        predicted = sum(op_time(row, target).time_us for row in rows) * count if rows else None
        shown = str(op.results[0].type) if op.results else ""
        out.append(OpTime(function, index, op.name, shown, count, microseconds, least * count, predicted))
    return tuple(sorted(out, key=lambda o: -o.us))
