"""GPU kernels in one table: `python benchmarks/gpu.py` on a machine with a GPU, `--dry-run` anywhere.

With a GPU (Triton and torch, no TVM): every kernel is first checked against its reference through Triton's JIT and
through the packed binary, then timed with CUDA events (median, level-2 cache flushed) beside torch on the same
problem; the table and its JSON are saved. The dry run compiles every kernel for every architecture and prints what the
compiler says of it, with times PREDICTED from the data sheet's rates: nothing there is measured but compile seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from gpu_model import BATCHES, measured_steps, predicted_step
from gpu_predict import SHEETS, predicted_us, sizes
from gpu_timing import layers, measure, wanted

from moec.codegen.triton import aot
from moec.codegen.triton.arch import ARCHITECTURES, architecture
from moec.codegen.triton.problem import check, launch, make
from moec.codegen.triton.spec import Instance, instances, registry
from moec.errors import MoecError
from moec.targets import load

FLUSH_BYTES = 512 << 20


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns padded to their widest cell; the first two to the left, numbers to the right."""
    cells = [head, *rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        padded = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])


def dry_run(architectures: list[str], cold: bool, jobs: int) -> dict[str, Any]:
    """Compiles everything and prints one table per architecture."""
    result: dict[str, Any] = {"measured": False}
    for arch in architectures:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as empty:
            folder = Path(empty) if cold else None
            compiled = aot.compile_kernels(instances(arch), jobs=jobs, folder=folder, strict=False)
        seconds = time.perf_counter() - started
        rows = [
            (
                k.instance.name, k.facts["tensor_instruction"] or "-", str(k.facts["registers"]),
                f"{k.facts['spill_stores']}{' listed' if k.spills_listed else ''}", str(k.facts["shared_bytes"]),
                f"{k.seconds:.2f}", f"{predicted_us(k.instance):.1f}", "; ".join(k.problems()) or "ok",
            )
            for k in compiled
        ]  # fmt: skip
        head = (
            "kernel",
            "instruction",
            "registers",
            "spill bytes",
            "shared bytes",
            "compile s",
            "PREDICTED us",
            "checks",
        )
        cached = sum(k.cached for k in compiled)
        print(
            f"\n{arch}: {len(rows)} kernels in {seconds:.1f} s, {cached} from the cache; predicted for {SHEETS[arch]}"
        )
        print(table(head, rows))
        steps = {batch: predicted_step(load(SHEETS[arch]), batch) for batch in BATCHES}
        print("decode of 4 DeepSeek-V3 layers, context 4096, PREDICTED: " + ", ".join(
            f"batch {batch} {us / 1e3:.2f} ms ({count} launches)" for batch, (us, count) in steps.items()
        ))  # fmt: skip
        left_out = sorted(s.name for s in registry().values() if arch not in s.tiles)
        print(f"not on {arch}: {', '.join(left_out) or 'none'}")
        result[arch] = {
            "seconds": seconds,
            "cached": cached,
            "predicted_decode_us": {str(batch): us for batch, (us, _) in steps.items()},
            "kernels": [{**k.record(), "compile_s": k.seconds, "predicted_us": predicted_us(k.instance),
                         "problems": k.problems()} for k in compiled],
        }  # fmt: skip
    return result


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


def packed_launcher(folder: Path) -> Callable[[Instance, dict[str, Any]], None]:
    """Compiles an instance ahead of time, loads its cubin through the driver and launches that."""
    import torch

    from moec.runtime.cuda import Driver, Kernel
    from moec.runtime.cuda.arguments import Matrix

    driver = Driver()

    def run(instance: Instance, arguments: dict[str, Any]) -> None:
        compiled = aot.compile_kernels([instance], jobs=1, folder=folder, strict=False)[0]
        packed = Kernel(driver, compiled.record(), compiled.binary)
        values = {}
        for name, kind in instance.signature.items():
            value = arguments[name]
            if kind.startswith("tensordesc"):
                value = Matrix(value.data_ptr(), tuple(value.shape), tuple(value.stride()))
            values[name] = value
        packed.launch(instance.grid(), values, stream=torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()

    return run


def checks(arch: str) -> Iterator[tuple[str, float, str]]:
    """(name, worst error as a share of its bound, what went wrong) for every case, and the first case packed."""
    with tempfile.TemporaryDirectory() as empty:
        packed = packed_launcher(Path(empty))
        for spec in registry().values():
            for shape in spec.tiles.get(arch, {}):
                for number, case in enumerate(c for c in spec.cases if not c.interpreted):
                    for way, run in (("jit", launch), ("packed", packed))[: 2 if number == 0 else 1]:
                        name = f"{spec.name}.{shape}, {case.name}, {way}"
                        try:
                            worst = max(check(make(spec, case, arch, shape, device="cuda"), run).values())
                            yield name, worst, "" if worst <= 1 else "outside its bound"
                        except Exception as error:
                            yield name, float("inf"), f"{type(error).__name__}: {str(error).splitlines()[0]}"


def run_on_gpu(out: Path) -> int:
    """Checks, then times, then prints and saves. The exit code is 1 when a check failed."""
    import torch

    arch = this_arch()
    about = machine()
    print(", ".join(f"{k} {v}" for k, v in about.items()), f"architecture {arch}", sep=", ")
    outcome = list(checks(arch))
    failed = [f"{name}: {reason}" for name, _, reason in outcome if reason]
    print(f"{len(outcome) - len(failed)} of {len(outcome)} checks pass", *failed, sep="\n  ")
    broken = {f.partition(",")[0].rpartition(".")[0] for f in failed}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    rows = []
    for instance in wanted(arch):
        if instance.spec.name in broken:
            continue
        print(f"  {instance.name} {sizes(instance)}", file=sys.stderr)
        rows.append(measure(instance, flush))
        torch.cuda.empty_cache()
    if "sm_9" in arch and not broken:
        rows += layers(arch, flush)
    decode = {}
    try:
        for batch, us in measured_steps() if not failed else ():
            decode[batch] = us
            print(f"decode of 4 DeepSeek-V3 layers, batch {batch}: {us / 1e3:.2f} ms a step")
    except Exception as error:
        print(f"  the model: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
    text = table(
        ("kernel", "sizes", "us", "TFLOP/s", "GB/s", "beside (us)"),
        [
            (r.kernel, r.sizes, f"{r.microseconds:.1f}", f"{r.tflops:.1f}", f"{r.gbytes_per_s:.0f}",
             ", ".join(f"{n} {t:.1f}" for n, t in r.peers.items()))
            for r in rows
        ],
    )  # fmt: skip
    print(text)
    saved = {"measured": True, "machine": about, "arch": arch, "failed": failed, "checks": len(outcome)}
    save(out, {**saved, "after": machine(), "rows": [asdict(r) for r in rows], "decode_us": decode}, text)
    return 1 if failed else 0


def save(out: Path, result: dict[str, Any], text: str = "") -> None:
    """The JSON, and the table beside it."""
    out.write_text(json.dumps(result, indent=1) + "\n")
    if text:
        out.with_suffix(".txt").write_text(text + "\n")
    print(f"saved {out}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="compile and predict; needs no GPU")
    parser.add_argument("--arch", action="append", choices=sorted(ARCHITECTURES), help="dry run for these alone")
    parser.add_argument("--cold", action="store_true", help="dry run with an empty cache")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes of the dry run")
    parser.add_argument("--out", type=Path, help="file for the JSON (default: gpu-results.json; a dry run saves none)")
    options = parser.parse_args()
    try:
        if options.dry_run:
            result = dry_run(options.arch or list(ARCHITECTURES), options.cold, options.jobs)
            if options.out:
                save(options.out, result)
            return 0
        return run_on_gpu(options.out or Path("gpu-results.json"))
    except MoecError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
