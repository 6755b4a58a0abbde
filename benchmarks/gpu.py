"""GPU kernels in one table: `python benchmarks/gpu.py` on a machine with a GPU, `--dry-run` anywhere.

With a GPU (Triton and torch, no TVM), in stages (`--only`): every kernel, those generated for a program among them, is
compiled ahead of time, launched from its packed binary and checked against its reference; the launches of a four-layer
DeepSeek-V3's step are timed one by one and as a CUDA graph; single kernels at published shapes and a layer's experts
are timed beside torch. Times are medians from CUDA events, level-2 cache flushed. The JSON is saved after every row,
so that a run that is cut short keeps what it has. The dry run compiles every kernel for every architecture and prints
what the compiler says of it, with times PREDICTED from the data sheet's rates: only compile seconds are measured there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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
    measured_steps,
    predicted_step,
    program_for,
    run_once,
    target_here,
    with_folder,
)
from gpu_peers import compiled_experts
from gpu_predict import predicted_us, sizes
from gpu_tables import measured_table, table
from gpu_timing import Packed, Row, measure, timed_us, wanted

from moec.codegen.triton.arch import ARCHITECTURES, architecture
from moec.codegen.triton.fused.check import symbols as symbols_of
from moec.codegen.triton.fused.choice import BULK_COPIES
from moec.codegen.triton.problem import Problem, check, make
from moec.codegen.triton.spec import Instance, registry
from moec.errors import MoecError
from moec.ir.expr import evaluate
from moec.targets import Target, load

FLUSH_BYTES = 512 << 20


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


STAGES = ("checks", "program", "kernels", "layer")


@dataclass
class Session:
    """What a run has found so far: saved after every row, so that a run that is cut short keeps what it has."""

    out: Path
    arch: str
    jobs: int
    ends: float
    result: dict[str, Any]

    def late(self) -> bool:
        """Whether no new measurement is begun."""
        return time.monotonic() > self.ends

    def add(self, key: str, value: Any) -> None:
        """Append to a list of the result and save."""
        self.result.setdefault(key, []).append(value)
        beside = self.out.with_suffix(".new")
        beside.write_text(json.dumps(self.result, indent=1) + "\n")
        beside.replace(self.out)


def checked(problems: list[tuple[str, Problem]], jobs: int) -> Iterator[tuple[str, float, str]]:
    """(name, worst error as a share of its bound, what went wrong) of each problem, run from its packed binary."""
    packed = Packed([p.instance for _, p in problems], jobs)
    for name, problem in problems:
        try:
            worst = max(check(problem, packed.run).values())
            yield name, worst, "" if worst <= 1 else "outside its bound"
        except Exception as error:
            yield name, float("inf"), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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


def run_checks(session: Session) -> None:
    """Every kernel against its reference, those of a program against the IR's own evaluation, and a whole model."""
    problems = [
        (f"{spec.name}.{shape}, {case.name}", make(spec, case, session.arch, shape, device="cuda"))
        for spec in registry().values()
        for shape in spec.tiles.get(session.arch, {})
        for case in spec.cases
        if not case.interpreted
    ]
    problems += generated_problems(load(target_here()))
    failed = 0
    for name, worst, reason in checked(problems, session.jobs):
        failed += bool(reason)
        session.add("checks", {"name": name, "worst": worst if worst < float("inf") else None, "reason": reason})
        if reason:
            print(f"  {name}: {reason} ({worst:.3g})", flush=True)
    print(f"{len(problems) - failed} of {len(problems)} checks pass", flush=True)
    worst = with_folder(logits_error)
    session.add("logits", worst)
    print(f"logits of a small model in BF16: worst error {worst:.3g} of their standard deviation", flush=True)
    session.result["failed"] = failed + (worst > 0.06)


def run_program(session: Session) -> None:
    """The kernels that users get: every launch of a four-layer model's step, then the step as a graph."""
    import torch

    target = load(target_here())
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    place = flush.data_ptr(), FLUSH_BYTES

    def work(folder: Path) -> None:
        began = time.perf_counter()
        program, engine, _kept = engine_for(folder)
        print(f"compiled and loaded in {time.perf_counter() - began:.0f} s", flush=True)
        for batch, host, device in measured_steps(engine):
            expected = predicted_step(target, batch)[0]
            session.add("steps", {"batch": batch, "host_us": host, "device_us": device, "predicted_us": expected})
            print(
                f"decode of 4 DeepSeek-V3 layers, batch {batch}: {host / 1e3:.2f} ms a step, {device / 1e3:.2f} ms on "
                f"the device, {expected / 1e3:.2f} ms PREDICTED", flush=True,
            )  # fmt: skip
        idle = event_timer(engine, lambda stream: None, [place])
        session.add("empty_us", median(idle() for _ in range(REPEATS)))
        print(f"an interval without a launch: {session.result['empty_us'][0]:.1f} us, part of every time below")
        rows = []
        for phase, tokens in (*(("decode", b) for b in BATCHES), ("prefill", CONTEXT)):
            if phase == "prefill":
                run_once(engine, phase, tokens)
            for name, instance, times, us in measured_launches(engine, program, phase, tokens, place):
                flops, moved, bound = instance.flops(), instance.bytes(), predicted_us(instance, target)
                line = (name, f"{phase} {tokens}", f"{times}", f"{us:.1f}", f"{bound:.1f}", f"{flops / us / 1e6:.1f}",
                        f"{moved / us / 1e3:.0f}")  # fmt: skip
                rows.append(line)
                session.add("launches", {"kernel": name, "phase": phase, "tokens": tokens, "times": times, "us": us,
                                         "predicted_us": bound, "flops": flops, "bytes": moved})  # fmt: skip
                if session.late():
                    break
        head = ("launch", "at", "a step", "us", "PREDICTED us", "TFLOP/s", "GB/s")
        print(table(head, rows), flush=True)

    with_folder(work)


def run_kernels(session: Session) -> None:
    """Single kernels at published shapes, beside torch on the same problem."""
    import torch

    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    instances_ = wanted(load(target_here()))
    packed = Packed(instances_, session.jobs)
    rows = []
    for instance in instances_:
        if session.late():
            print("  out of time: what is left was not measured", flush=True)
            break
        try:
            rows.append(measure(instance, packed, flush))
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            print(f"  {instance.name} {sizes(instance)}: {type(error).__name__}: {said}", flush=True)
            continue
        session.add("rows", asdict(rows[-1]))
        torch.cuda.empty_cache()
    print(measured_table(rows), flush=True)


def run_layer(session: Session) -> None:
    """The routed experts of one layer, from the gate to the sum, as the program launches them, beside torch.compile."""
    import torch

    count, width, inner = 256, 7168, 2048
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def work(folder: Path) -> None:
        program, engine, _kept = engine_for(folder)
        peer = compiled_experts(count, width, inner, top_k=8, groups=8, kept=4)
        rows = []
        for phase, tokens in (*(("decode", b) for b in BATCHES), ("prefill", CONTEXT)):
            # What a real step leaves is what the gate reads.
            run_once(engine, phase, tokens)
            once = experts_timer(engine, program, phase, tokens, (flush.data_ptr(), FLUSH_BYTES))
            us = median(once() for _ in range(REPEATS))
            used = min(count, 8 * tokens)
            flops, moved = 6 * 8 * tokens * width * inner, 3 * used * width * inner
            row = Row("routed experts", f"T={tokens}", us, flops / us / 1e6, moved / us / 1e3)
            x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
            try:
                row.peers["torch.compile, BF16"] = timed_us(partial(peer, x), flush)
            except Exception as error:
                said = (str(error).splitlines() or [""])[0]
                print(f"  torch.compile of the layer: {type(error).__name__}: {said}", file=sys.stderr)
            rows.append(row)
            session.add("rows", asdict(row))
            if session.late():
                break
        print(measured_table(rows), flush=True)

    with_folder(work)


def run_on_gpu(out: Path, stages: Sequence[str], minutes: float, jobs: int) -> int:
    """The stages in order; one that breaks is told, and the next runs. The exit code is 1 when something failed."""
    session = Session(out, this_arch(), jobs, time.monotonic() + 60 * minutes, {"measured": True})
    session.result |= {"machine": machine(), "arch": session.arch, "failed": 0}
    print(", ".join(f"{k} {v}" for k, v in session.result["machine"].items()), f"architecture {session.arch}", sep=", ")
    run = {"checks": run_checks, "program": run_program, "kernels": run_kernels, "layer": run_layer}
    for stage in stages:
        began = time.perf_counter()
        try:
            run[stage](session)
        except Exception as error:
            session.result["failed"] += 1
            traceback.print_exc()
            print(f"  {stage}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
        session.add("stages", {"stage": stage, "seconds": time.perf_counter() - began})
    session.add("after", machine())
    return 1 if session.result["failed"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="compile and predict; needs no GPU")
    parser.add_argument("--arch", action="append", choices=sorted(ARCHITECTURES), help="dry run for these alone")
    parser.add_argument("--cold", action="store_true", help="dry run with an empty cache")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="compiler processes")
    parser.add_argument("--only", action="append", choices=STAGES, help="on a GPU: these stages alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="on a GPU: begin no measurement after so many")
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
        return run_on_gpu(out, options.only or STAGES, options.minutes, options.jobs)
    except MoecError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
