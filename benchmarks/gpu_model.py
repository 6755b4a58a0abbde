"""A whole DeepSeek-V3 decode step on a GPU: predicted from the launches of its program, or measured with graphs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from gpu_predict import predicted_us

import moec
from moec.codegen.triton.program import PAGE, Program, lower_module
from moec.codegen.triton.spec import Instance
from moec.ir.expr import evaluate
from moec.targets import Target

LAYERS = {"num_hidden_layers": "4", "first_k_dense_replace": "1"}
BATCHES = (1, 32, 128)
CONTEXT = 4096
REPEATS = 20


def launches(steps: list[Any], times: int = 1) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Every launch of a program and how often it runs."""
    for step in steps:
        if "repeat" in step:
            first, last = step["repeat"]
            yield from launches(step["steps"], times * (last - first + 1))
        elif "kernel" in step:
            yield step, times


def program_for(target: Target) -> Program:
    """The decode program of four layers (one dense) at the largest batch."""
    plan = moec.trace("deepseek-v3", LAYERS).optimize(target, phase="decode", batch=BATCHES[-1], context=CONTEXT)
    return lower_module(plan.ir, target, vars(plan.context.limits), tiles={})


def at(instance: Instance, step: Mapping[str, Any], batch: int) -> Instance:
    """The kernel with the sizes that a launch has in a step of `batch` sequences, for its declared cost."""
    heads = instance.dims.get("HEADS", 1)
    sizes = {
        "T": batch, "R": batch, "B": batch, "S": batch * CONTEXT, "C": CONTEXT, "CONTEXT": CONTEXT, "QUERIES": 1,
        "N": CONTEXT // PAGE,
    }  # fmt: skip
    # One binary serves products of many sizes: they are arguments of the launch.
    sizes |= {n: v for n, v in step["arguments"].items() if n in ("N", "K") and isinstance(v, int)}
    if instance.spec.name == "mla_decode_combine":
        sizes |= {"ROWS": 128, "SPLITS": 2}
    if instance.spec.source:
        kernel = instance.spec.build.keywords["kernel"]  # type: ignore[attr-defined]
        sizes["ROWS"] = evaluate(kernel.rows, sizes)
    return replace(instance, dims={**instance.dims, **sizes, "HEADS": heads})


def predicted_step(target: Target, batch: int) -> tuple[float, int]:
    """Microseconds and launches of a decode step, each at the data sheet's bound plus one launch in a graph."""
    program = program_for(target)
    total, count = 0.0, 0
    for step, times in launches(program.phases["decode"].steps):
        entry = program.table.entries[step["kernel"]]
        total += times * predicted_us(at(entry.instance, step, batch), target)
        count += times
    return total, count


def measured_steps() -> Iterator[tuple[int, float]]:
    """(batch, microseconds of a decode step) on the GPU here: artifact compiled, loaded and replayed as graphs."""
    import torch

    from moec.runtime.artifact import open_artifact
    from moec.runtime.cuda.engine import GpuEngine

    name = "h100" if torch.cuda.get_device_capability()[0] == 9 else "b200"
    plan = moec.trace("deepseek-v3", LAYERS).optimize(name, phase="decode", batch=BATCHES[-1], context=CONTEXT)
    with tempfile.TemporaryDirectory() as folder:
        plan.compile(Path(folder) / "m.moec", random_weights=0)
        engine = GpuEngine(open_artifact(Path(folder) / "m.moec"))
        for batch in BATCHES:
            sequences = [engine.pool.open() for _ in range(batch)]
            # As if each had half of the context: what the cache holds does not change the time.
            for sequence in sequences:
                engine.pool.extend(sequence, CONTEXT // 2)
                sequence.length = CONTEXT // 2
            for _ in range(3):
                engine.decode(sequences, [1] * batch)
            times = []
            for _ in range(REPEATS):
                began = time.perf_counter()
                engine.decode(sequences, [1] * batch)
                times.append(1e6 * (time.perf_counter() - began))
            yield batch, median(times)
            for sequence in sequences:
                engine.pool.close(sequence)
