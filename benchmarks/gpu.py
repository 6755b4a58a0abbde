"""GPU kernels in one table: `python benchmarks/gpu.py` on a machine with a GPU, `--dry-run` anywhere.

With a GPU (Triton and torch, no TVM), in stages (`--only`): every kernel, those generated for a program among them, is
compiled ahead of time, launched from its packed binary and checked against its reference; the launches of a four-layer
DeepSeek-V3's step are timed one by one and as a CUDA graph; other tiles of its kernels are measured and kept where they
win, and the step again; single kernels at published shapes and a layer's experts are timed beside torch. Times are
medians from CUDA events, level-2 cache flushed. Each stage is a process, and what crashes or hangs loses one row
(gpu_session.py); the JSON is saved after every row, and `--resume` goes on behind what a file holds. The dry run
compiles every kernel for every architecture and prints what the compiler says of it, with times PREDICTED from the data
sheet's rates: only compile seconds are measured there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from gpu_dry_run import dry_run
from gpu_model import (
    BATCHES,
    CONTEXT,
    REPEATS,
    SMALL,
    engine_for,
    event_timer,
    experts_timer,
    logits_error,
    measured_launches,
    measured_step,
    predicted_step,
    program_for,
    run_once,
    target_here,
    with_folder,
)
from gpu_peers import compiled_experts
from gpu_predict import predicted_us, sizes
from gpu_session import SET_UP, Session, save, supervise, trying
from gpu_tables import launch_table, measured_table
from gpu_timing import Packed, Row, measure, timed_us, wanted
from gpu_tune import tuned

from moec.codegen.triton.arch import ARCHITECTURES, architecture
from moec.codegen.triton.fused.check import symbols as symbols_of
from moec.codegen.triton.fused.choice import BULK_COPIES
from moec.codegen.triton.problem import Problem, check, make
from moec.codegen.triton.spec import Instance, registry
from moec.errors import MoecError
from moec.ir.expr import evaluate
from moec.targets import Target, load

FLUSH_BYTES = 512 << 20
EXPERTS = (256, 7168, 2048)
"""Of a DeepSeek-V3 layer: how many, and the widths of their input and between their products."""


def this_arch() -> str:
    """The architecture of the GPU here. Raises NoDriver without one, UnknownArchitecture for another kind."""
    import torch

    from moec.runtime.cuda.errors import NoDriver

    if not torch.cuda.is_available():
        raise NoDriver(reason="torch finds no GPU")
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    names = (f"sm_{capability}a", f"sm_{capability}", f"sm_{capability[0]}0")
    return architecture(next((n for n in names if n in ARCHITECTURES), names[0])).name


def machine() -> dict[str, str]:
    """Device, versions and clocks."""
    import torch
    import triton

    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    ]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        told = []
    return {
        "device": torch.cuda.get_device_name(),
        "nvidia-smi": told[0] if told else "not available",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


STAGES = ("checks", "program", "tune", "kernels", "layer")
WORST_LOGIT = 0.06
"""Of the standard deviation of a small model's logits, in BF16."""


def generated_problems(target: Target) -> list[tuple[str, Problem]]:
    """The kernels of a small model's program, at one token, a ragged tile and more than one tile.

    Experts also with all tokens at one and with none, products also in the forms that the cost model did not take.
    """
    import torch

    found = []
    _, program = program_for(target, SMALL)
    for name, entry in program.table.entries.items():
        if not entry.instance.spec.source:
            continue
        kernel = entry.instance.spec.build.keywords["kernel"]  # type: ignore[attr-defined]
        loads = (0, 1, 2) if "ALIGN" in entry.instance.dims else (0,)
        runs = [(entry.instance, tokens, 0) for tokens in (1, 5, 100)]
        runs += [(entry.instance, 5, spread) for spread in loads[1:]]
        runs += [(other, 100, 0) for other in other_forms(entry.instance)]
        for instance, tokens, spread in runs:
            rows = evaluate(kernel.rows, symbols_of(tokens))
            dims = {**instance.dims, "T": tokens, "ROWS": rows, "LOAD": spread}
            problem = Problem(replace(instance, dims=dims), torch.Generator().manual_seed(tokens), "cuda")
            form = "".join(f", {n}" for n in ("TMA", "WS") if instance.tile.constants.get(n))
            found.append((f"{name}, {tokens} tokens, load {spread}{form}", problem))
    return found


def other_forms(instance: Instance) -> list[Instance]:
    """A product by pointers where it has descriptors and the other way round, and with warps for the loads."""
    tile, bulk = instance.tile, instance.arch in BULK_COPIES
    if not instance.spec.boxes or not bulk:
        return []
    forms = [{"TMA": 1 - tile.constants["TMA"], "WS": 0}]
    forms += [{"TMA": 1, "WS": 1}] if tile.num_warps == 4 and instance.arch == "sm_90a" else []
    return [replace(instance, tile=replace(tile, constants={**tile.constants, **form})) for form in forms]


def declared_problems(arch: str) -> list[tuple[str, Problem]]:
    """The cases of declared kernels, whole shapes first: a kernel's first case before any second one."""
    found = []
    for spec in registry().values():
        for shape in spec.tiles.get(arch, {}):
            cases = [case for case in spec.cases if not case.interpreted]
            for number, case in enumerate(cases):
                name = f"{spec.name}.{shape}, {case.name}"
                found.append((number, name, partial(make, spec, case, arch, shape, device="cuda")))
    return [(name, make_it()) for _, name, make_it in sorted(found, key=lambda f: f[0])]


def run_checks(session: Session) -> None:
    """Every kernel against its reference, those of a program against the IR's own evaluation, and a whole model."""
    problems = [*generated_problems(load(target_here())), *declared_problems(session.arch)]
    packed = Packed([p.instance for _, p in problems], session.jobs)
    for _ in session.left([("logits of a small model", None)]):
        with session.attempt("logits of a small model"):
            worst = with_folder(logits_error)
            session.add("logits", worst)
            print(f"logits of a small model in BF16: worst error {worst:.3g} of their standard deviation", flush=True)
            assert worst < WORST_LOGIT, f"outside {WORST_LOGIT}"
    for name, problem in session.left(problems):
        with session.attempt(name):
            worst = max(check(problem, packed.run).values())
            session.add("checks", {"name": name, "worst": worst if worst < float("inf") else None})
            assert worst <= 1, f"{worst:.3g} of its bound"


def flushed() -> tuple[Any, tuple[int, int]]:
    """Memory larger than the level-2 cache: a tensor, and its address and bytes."""
    import torch

    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    return flush, (flush.data_ptr(), FLUSH_BYTES)


def run_steps(session: Session, engine: Any, target: Target, label: str) -> None:
    """Decode steps of the four-layer model as graphs."""
    for name, batch in session.left([(f"{label} at batch {b}", b) for b in BATCHES]):
        with session.attempt(name):
            host, device = measured_step(engine, batch)
            expected = predicted_step(target, batch)[0]
            row = {"batch": batch, "host_us": host, "device_us": device, "predicted_us": expected}
            session.add("steps", {"label": label, **row})
            print(
                f"{name}, 4 DeepSeek-V3 layers: {host / 1e3:.2f} ms a step, {device / 1e3:.2f} ms on the device, "
                f"{expected / 1e3:.2f} ms PREDICTED", flush=True,
            )  # fmt: skip


def run_program(session: Session) -> None:
    """The kernels that users get: the step of a four-layer model as a graph, then each of its launches."""
    target = load(target_here())

    def work(folder: Path) -> None:
        program, engine, _kept = engine_for(folder)
        run_steps(session, engine, target, "decode")
        _flush, place = flushed()
        idle = event_timer(engine, lambda stream: None, [place])
        session.add("empty_us", median(idle() for _ in range(REPEATS)))
        for phase, tokens in (*(("decode", b) for b in BATCHES), ("prefill", CONTEXT)):
            label = f"{phase} {tokens}"
            if f"{label}, whole" in session.failed():
                continue
            with session.attempt(f"{label}, whole"):
                run_once(engine, phase, tokens)
            named = measured_launches(engine, program, phase, tokens, place)
            for name, (instance, times, timed) in session.left((f"{label}: {n}", (i, t, u)) for n, i, t, u in named):
                with session.attempt(name):
                    us = timed()
                    session.add("launches", {
                        "kernel": name.partition(": ")[2], "phase": phase, "tokens": tokens, "times": times, "us": us,
                        "predicted_us": predicted_us(instance, target), "flops": instance.flops(),
                        "bytes": instance.bytes(),
                    })  # fmt: skip

    with_folder(work)


def run_tune(session: Session) -> None:
    """Other tiles of the program's kernels; those that win and are right are kept, and the step is measured again."""
    target = load(target_here())
    stop = (time.time() + session.ends) / 2

    def say(line: str) -> None:
        trying(session.out, session.stage, SET_UP)
        print(f"  {line}", flush=True)

    for _ in session.left([("tiles", None)]):
        with session.attempt("tiles"):
            say("measuring tiles")
            with_folder(
                lambda folder: tuned(
                    folder, target, lambda: time.time() > stop, session.jobs, say, partial(session.add, "tiles")
                )
            )

    def work(folder: Path) -> None:
        _, engine, _kept = engine_for(folder)
        run_steps(session, engine, target, "decode with measured tiles")

    with_folder(work)


def run_kernels(session: Session) -> None:
    """Single kernels at published shapes, beside torch on the same problem."""
    import torch

    flush, _ = flushed()
    instances_ = wanted(load(target_here()))
    packed = Packed(instances_, session.jobs)
    for name, instance in session.left([(f"{i.name} {sizes(i)}", i) for i in instances_]):
        with session.attempt(name):
            session.add("rows", asdict(measure(instance, packed, flush)))
        torch.cuda.empty_cache()


def run_layer(session: Session) -> None:
    """The routed experts of one layer, from the gate to the sum, as the program launches them, beside torch.compile."""
    import torch

    count, width, inner = EXPERTS
    flush, place = flushed()

    def work(folder: Path) -> None:
        program, engine, _kept = engine_for(folder)
        peer = compiled_experts(count, width, inner, top_k=8, groups=8, kept=4)
        phases = [*(("decode", b) for b in BATCHES), ("prefill", CONTEXT)]
        for name, (phase, tokens) in session.left([(f"experts, {p} {n}", (p, n)) for p, n in phases]):
            with session.attempt(name):
                # What a real step leaves is what the gate reads.
                run_once(engine, phase, tokens)
                once = experts_timer(engine, program, phase, tokens, place)
                us = median(once() for _ in range(REPEATS))
                used = min(count, 8 * tokens)
                flops, moved = 6 * 8 * tokens * width * inner, 3 * used * width * inner
                session.add(
                    "rows", asdict(Row("routed experts", f"T={tokens}", us, flops / us / 1e6, moved / us / 1e3))
                )
            trying(session.out, session.stage, SET_UP)  # autotuning takes its time
            x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
            try:
                us = timed_us(partial(peer, x), flush)
            except Exception as error:
                said = (str(error).splitlines() or [""])[0]
                print(f"  torch.compile of the layer: {type(error).__name__}: {said}", flush=True)
                continue
            session.add("rows", asdict(Row("torch.compile, BF16", f"T={tokens}", us, 0.0, 0.0)))

    with_folder(work)


RUN = {"checks": run_checks, "program": run_program, "tune": run_tune, "kernels": run_kernels, "layer": run_layer}


def run_on_gpu(out: Path, stages: Sequence[str], minutes: float, jobs: int, resume: bool) -> int:
    """The stages in order, each in processes of its own. The exit code is 1 when something failed."""
    result: dict[str, Any] = json.loads(out.read_text()) if resume and out.exists() else {"measured": True}
    # Asked in a process of its own: this one never touches the device.
    told = subprocess.run(
        [sys.executable, __file__, "--inside", "machine"], capture_output=True, text=True, timeout=120
    )
    if told.returncode:
        print(told.stderr.strip().splitlines()[-1] if told.stderr.strip() else "no answer", file=sys.stderr)
        return 2
    result |= {"ends": time.time() + 60 * minutes, **json.loads(told.stdout)}
    save(out, result)
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()), f"architecture {result['arch']}", sep=", ")
    for stage in stages:
        began = time.time()
        command = [sys.executable, __file__, "--inside", stage, "--out", str(out), "--jobs", str(jobs)]
        whole = supervise(command, out, stage)
        result = json.loads(out.read_text())
        result.setdefault("stages", []).append({"stage": stage, "whole": whole, "seconds": time.time() - began})
        save(out, result)
        show(stage, result)
    failures = result.get("failures", [])
    print(f"{len(failures)} things failed" + (f", see {out}" if failures else ""))
    return 1 if failures else 0


def show(stage: str, result: dict[str, Any]) -> None:
    """The table of a stage, as far as it came."""
    took = result["stages"][-1]["seconds"]
    print(f"{stage}: {len(result.get(f'done {stage}', []))} things done in {took:.0f} s", flush=True)
    if stage == "program":
        print(f"an interval without a launch: {median(result.get('empty_us', [0.0])):.1f} us, part of every time below")
        print(launch_table(result.get("launches", [])), flush=True)
    elif stage in ("kernels", "layer"):
        print(measured_table([Row(**row) for row in result.get("rows", [])]), flush=True)


def inside(stage: str, out: Path, jobs: int) -> int:
    """One stage in this process. Raises what keeps it from beginning."""
    if stage == "machine":
        arch = this_arch()
        print(json.dumps({"machine": machine(), "arch": arch}))
        return 0
    session = Session.opened(out, stage, jobs)
    try:
        RUN[stage](session)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="compile and predict; needs no GPU")
    parser.add_argument("--arch", action="append", choices=sorted(ARCHITECTURES), help="dry run for these alone")
    parser.add_argument("--cold", action="store_true", help="dry run with an empty cache")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="compiler processes")
    parser.add_argument("--only", action="append", choices=STAGES, help="on a GPU: these stages alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="on a GPU: begin no measurement after so many")
    parser.add_argument("--resume", action="store_true", help="on a GPU: go on behind what the file of --out holds")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="file for the JSON (default: gpu-results.json; a dry run saves none)")
    options = parser.parse_args()
    try:
        if options.dry_run:
            result = dry_run(options.arch or list(ARCHITECTURES), options.cold, options.jobs)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
                print(f"saved {options.out}", file=sys.stderr)
            return 0
        out = options.out or Path("gpu-results.json")
        if options.inside:
            return inside(options.inside, out, options.jobs)
        return run_on_gpu(out, options.only or STAGES, options.minutes, options.jobs, options.resume)
    except MoecError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
