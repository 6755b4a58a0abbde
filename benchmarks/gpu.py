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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from gpu_peers import PEERS, compiled_experts

from moec.codegen.triton import aot
from moec.codegen.triton.arch import ARCHITECTURES, architecture
from moec.codegen.triton.compose import Chain, Experts, routed_experts
from moec.codegen.triton.problem import Problem, bind, check, launch, make, move
from moec.codegen.triton.spec import Instance, instances, registry
from moec.codegen.triton.specs.recipe import quantise_128x128
from moec.errors import MoecError

# The target whose data sheet stands for an architecture in predictions.
SHEETS = {"sm_80": "a100", "sm_90a": "h800", "sm_100a": "b200", "gfx942": "mi300x"}
WARM_UP, REPEATS = 3, 30
FLUSH_BYTES = 512 << 20
GEMM_NK = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))


@dataclass
class Row:
    """One line of the table: a kernel at one size."""

    kernel: str
    sizes: str
    microseconds: float
    tflops: float
    gbytes_per_s: float
    peers: dict[str, float] = field(default_factory=dict)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns padded to their widest cell; the first two to the left, numbers to the right."""
    cells = [head, *rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        padded = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])


def element(instance: Instance) -> str:
    """The type in which the kernel multiplies."""
    fp8 = any("fp8" in kind for name, kind in instance.signature.items() if name[0] in "ab")
    return "fp8" if fp8 else "bf16"


def predicted_us(instance: Instance) -> float:
    """The bound from rates and bandwidth of the data sheet, plus one launch; no efficiency is assumed."""
    from moec.targets import load

    device = load(SHEETS[instance.arch]).device
    rate = device.matrix_rate(element(instance)) if instance.spec.tensor_core else device.vector_rate
    return 1e6 * max(instance.flops() / rate, instance.bytes() / device.memory_bandwidth) + device.launch_us


def sizes(instance: Instance) -> str:
    """The dims that the kernel's cost depends on."""
    text = instance.spec.flops + instance.spec.bytes
    used = "".join(c if c.isalnum() or c == "_" else " " for c in text).split()
    return " ".join(f"{n}={v}" for n, v in instance.dims.items() if n in used)


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
        left_out = sorted(s.name for s in registry().values() if arch not in s.tiles)
        print(f"not on {arch}: {', '.join(left_out) or 'none'}")
        result[arch] = {
            "seconds": seconds,
            "cached": cached,
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


def wanted(arch: str) -> list[Instance]:
    """What is timed: matrix products at DeepGEMM's published shapes, decode at FlashMLA's, the rest as declared."""
    found = []
    for spec in registry().values():
        for shape in spec.tiles.get(arch, {}):
            base = spec.instance(arch, shape)
            if spec.name.startswith("fp8_gemm") or spec.name == "bf16_gemm":
                rows = (64, 128) if shape == "decode" else (4096,)
                found += [spec.instance(arch, shape, M=m, N=n, K=k) for m in rows for n, k in GEMM_NK]
            elif spec.name.startswith("mla_decode_split"):
                found += [spec.instance(arch, shape, CONTEXT=c, QUERIES=q) for c in (1024, 4096, 8192) for q in (1, 2)]
            elif "_masked" in spec.name and "capacity" in spec.signature and spec.tensor_core:
                found += [
                    spec.instance(arch, shape, E=e, CAPACITY=c, R=e * c, LOAD=-1) for e, c in ((1, 1024), (4, 256))
                ]
            elif "_contiguous" in spec.name and spec.tensor_core:
                found += [spec.instance(arch, shape, E=e, R=e * m, LOAD=-1) for e, m in ((4, 8192), (8, 4096))]
            else:
                found.append(base)
    return found


@dataclass
class DeviceProblem(Problem):
    """A problem filled on the device: for sizes that take too long on the host."""

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        import torch

        return torch.randn(shape, device=self.device) * scale

    def uniform(self, *shape: int) -> Any:
        import torch

        return torch.rand(shape, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Any:
        import torch

        return torch.randint(low, high, shape, device=self.device, dtype=torch.int32)

    def shuffled(self, n: int) -> Any:
        import torch

        return torch.randperm(n, device=self.device)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph, so that no host time is measured; as it is where it cannot be captured."""
    import torch

    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


def timed_us(run: Callable[[], Any], flush: Any) -> float:
    """Median time of one call, with the level-2 cache emptied before each."""
    import torch

    replay = captured(run)
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * float(start.elapsed_time(end)))
    return median(times)


def measure(instance: Instance, flush: Any) -> Row:
    """Times one kernel and, on the same arguments, what torch has for it."""
    import torch

    torch.manual_seed(0)
    problem = DeviceProblem(instance, torch.Generator(), "cuda")
    arguments = move(instance.spec.build(problem), "cuda")
    options = {"num_warps": instance.tile.num_warps, "num_stages": instance.tile.num_stages}
    start = instance.spec.jit()[instance.grid()]
    bound = {**bind(instance, arguments), **instance.constants, **options}
    us = timed_us(lambda: start(**bound), flush)
    row = Row(instance.name, sizes(instance), us, instance.flops() / us / 1e6, instance.bytes() / us / 1e3)
    for name, peer in PEERS.get(instance.spec.function, ()):
        try:
            row.peers[name] = timed_us(peer(instance, arguments), flush)
        except Exception as error:
            print(
                f"  {name} beside {instance.name}: {type(error).__name__}: {str(error).splitlines()[0]}",
                file=sys.stderr,
            )
    return row


def layer_weights() -> Experts:
    """One DeepSeek-V3 layer's router and 256 experts, random, quantised on the device one expert at a time."""
    import torch

    count, width, inner = 256, 7168, 2048
    gate_up = torch.empty(count, 2 * inner, width, dtype=torch.float8_e4m3fn, device="cuda")
    down = torch.empty(count, width, inner, dtype=torch.float8_e4m3fn, device="cuda")
    scales = [torch.empty(count, t.shape[1] // 128, t.shape[2] // 128, device="cuda") for t in (gate_up, down)]
    for e in range(count):
        for weight, scale in zip((gate_up, down), scales, strict=True):
            q, s = quantise_128x128(torch.randn(weight.shape[1:], device="cuda") * weight.shape[2] ** -0.5)
            weight[e], scale[e] = q, s
    router = (torch.randn(count, width, device="cuda") * width**-0.5).bfloat16()
    bias = 0.01 * torch.randn(count, device="cuda")
    return Experts(router, bias, gate_up, scales[0], down, scales[1], groups=8, top_groups=4, top_k=8, route_scale=2.5)


def layers(arch: str, flush: Any) -> Iterator[Row]:
    """The routed experts of one layer, nine kernels in a CUDA graph, beside torch.compile of the same layer in BF16."""
    import torch

    experts = layer_weights()
    peer = compiled_experts(experts)
    for tokens in (1, 32, 128, 4096):
        x = torch.randn(tokens, 7168, device="cuda").bfloat16()
        masked = tokens <= 128
        chain = Chain(arch, "decode" if masked else "prefill")
        us = timed_us(partial(routed_experts, chain, x, experts, masked), flush)
        used = min(256, 8 * tokens)
        row = Row(
            "routed experts",
            f"T={tokens}",
            us,
            6 * 8 * tokens * 7168 * 2048 / us / 1e6,
            3 * used * 7168 * 2048 / us / 1e3,
        )
        try:
            row.peers["torch.compile, BF16"] = timed_us(partial(peer, x), flush)
        except Exception as error:
            print(
                f"  torch.compile of the layer: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr
            )
        yield row


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
    save(out, {**saved, "after": machine(), "rows": [asdict(r) for r in rows]}, text)
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
