"""Whole artifacts through the GPU engine, the driver's stand-in and the interpreter, against the IR's evaluator."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from oracle import reference_logits
from standin import StandIn, fake_compile

import moec
from moec.codegen.triton.program import Program
from moec.frontend.checkpoint import RandomWeights
from moec.ir import Module, Op, verify
from moec.runtime.artifact import open_artifact
from moec.runtime.cuda.engine import GpuEngine
from moec.runtime.model import Model

CAPABILITY = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100a": (10, 0)}


def compile_uncompiled(program: Program, jobs: int = 2) -> list[Any]:
    """In place of `Program.compile`: the stand-in runs sources."""
    return [fake_compile(e.instance) for e in program.table.entries.values()]


def prompts_error(
    target: str, recipe: str, settings: Mapping[str, str], tokens: int, passes: Sequence[str] = (), phase: str = "both",
    streams: bool = False, model: str = "tiny-deepseek-v3",
) -> dict[str, Any]:  # fmt: skip
    """The worst error of the logits in units of their standard deviation, whole prompts and token by token."""
    plan = moec.trace(model, settings).optimize(
        target, batch=2, context=128, chunk=32, recipe=recipe, passes=passes, phase=phase
    )
    if streams:
        on_two_streams(plan.ir)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "m.moec"
        with mock.patch.object(Program, "compile", compile_uncompiled):
            plan.compile(out, random_weights=0)
        artifact = open_artifact(out)
        driver = StandIn(out / "kernels", CAPABILITY[plan.context.target.device.arch])
        loaded = Model(artifact, engine=GpuEngine(artifact, library=driver))
        ids = np.random.default_rng(0).integers(0, loaded.vocab, (2, tokens))
        got = {"whole": loaded.logits(ids), "steps": loaded.logits(ids, chunk=1)}
        listed = {r["name"] for r in driver.records.values()}
    worst = {}
    for name, logits in got.items():
        errors = []
        for row, sequence in zip(logits, ids, strict=True):
            want = reference_logits(plan.ir, RandomWeights(0).load, sequence, plan.phases[0]).numpy()
            errors.append(float(np.abs(row - want).max() / want.std()))
        worst[name] = max(errors)
    waits = [kind for kind, _, _ in driver.order]
    return {
        **worst,
        "maps": driver.maps,
        "replays": driver.replays,
        "idle": sorted(listed - set(driver.launches)),
        "events": waits,
    }


def on_two_streams(module: Module) -> None:
    """The shared expert of every MoE layer on a stream of its own, between events, as a schedule would have it."""
    for function in module.functions.values():
        shared = [op for op in function.ops if any("mlp.shared" in getattr(o, "name", "") for o in op.operands)]
        if not shared:
            continue
        first, last = function.ops.index(shared[0]), function.ops.index(shared[-1])
        for i, op in enumerate(function.ops):
            op.attrs["stream"] = "side" if first <= i <= last else "main"

        def event(kind: str, number: int, stream: str) -> Op:
            return Op(f"event.{kind}", [], {"event": number, "stream": stream}, [])

        function.ops[last + 1 : last + 1] = [event("record", 1, "side"), event("wait", 1, "main")]
        function.ops[first:first] = [event("record", 0, "main"), event("wait", 0, "side")]
    verify(module)
