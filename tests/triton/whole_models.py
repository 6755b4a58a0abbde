"""Whole artifacts through the GPU engine, the driver's stand-in and the interpreter, against the IR's evaluator."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from oracle import draft_reference, reference_logits
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
        # Only logits are asked for: nothing is drawn.
        listed = {r["name"] for r in driver.records.values()} - {"draw"}
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


def drafts_found(recipe: str, drafts: int, new: int) -> dict[str, Any]:
    """The trained model with its module: greedy tokens with and without drafts, the error of the module's logits."""
    traced = moec.trace("tiny-deepseek-v3", mtp=True)
    plan = traced.optimize("h800", batch=2, context=128, chunk=16, recipe=recipe, drafts=drafts)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "m.moec"
        with mock.patch.object(Program, "compile", compile_uncompiled):
            plan.compile(out)
        artifact = open_artifact(out)
        driver = StandIn(out / "kernels")
        loaded = Model(artifact, engine=GpuEngine(artifact, library=driver))
        text = loaded.tokenizer.encode("import os\nimport sys\n\ndef main(")
        # Longer than a chunk, and another whose end comes earlier.
        prompts = [text[:20], text[:4]]
        plain = loaded.generate(prompts, new, stop=())
        done = loaded.complete(prompts, new, stop=(), speculate=drafts)
        logits = loaded.draft_logits([text[:7]])[0]
        idle = sorted({r["name"] for r in driver.records.values()} - set(driver.launches))
    want = draft_reference(plan.ir, plan_tensors(plan), text[:7]).numpy()
    worst = float(np.abs(logits - want).max() / want.std())
    rates = {"tried": done.rates.drafted_tokens, "accepted": done.rates.accepted_tokens}
    return {"plain": plain, "drafted": done.tokens, "worst": worst, "idle": idle, **rates}


def draws_found(settings: Mapping[str, str], new: int) -> dict[str, Any]:
    """Tokens drawn on the device, of prompts together and alone, beside those that the host draws from its logits."""
    plan = moec.trace("tiny-deepseek-v3", settings).optimize("h800", batch=2, context=64, chunk=4, recipe="fp32")
    options: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "seed": 7, "top_k": 300, "min_p": 1e-3, "stop": ()}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "m.moec"
        with mock.patch.object(Program, "compile", compile_uncompiled):
            plan.compile(out, random_weights=0)
        artifact = open_artifact(out)
        driver = StandIn(out / "kernels")
        engine = GpuEngine(artifact, library=driver)
        loaded = Model(artifact, engine=engine)
        prompts = [[5, 6, 7, 8, 9, 10], [3]]
        device = loaded.generate(prompts, new, **options)
        greedy = loaded.generate(prompts[1], new, stop=())
        downloaded = max(driver.downloads)
        alone = loaded.generate(prompts[0], new, **options)
        other = loaded.generate(prompts[0], new, **{**options, "seed": 8})
        engine.draws = False
        host, host_greedy = loaded.generate(prompts, new, **options), loaded.generate(prompts[1], new, stop=())
    return {
        "device": device, "host": host, "alone": alone, "other": other, "greedy": greedy, "host_greedy": host_greedy,
        "downloaded": downloaded,
    }  # fmt: skip


def plan_tensors(plan: moec.Plan) -> Any:
    """What loads the tensors of a model that has some."""
    from moec.packing import tensors_of

    return tensors_of(plan.ir, plan.source, None, None, lambda line: None).load


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
