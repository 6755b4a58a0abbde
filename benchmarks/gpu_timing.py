"""Times of kernels and of a layer on a GPU, beside torch on the same problem."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from gpu_peers import PEERS, compiled_experts
from gpu_predict import sizes

from moec.codegen.triton import aot
from moec.codegen.triton.compose import Chain, Experts, routed_experts
from moec.codegen.triton.errors import CompileFailed
from moec.codegen.triton.problem import Problem, move
from moec.codegen.triton.spec import Instance, registry
from moec.codegen.triton.specs.recipe import quantise_128x128

WARM_UP, REPEATS = 3, 30
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


class Packed:
    """Kernels compiled ahead of time, all of them at once, and launched from their cubins as users' are."""

    def __init__(self, wanted: Sequence[Instance], jobs: int) -> None:
        """Raises NoDriver, DriverTooOld, TritonMissing; a kernel that does not compile or load fails when it is run."""
        from moec.runtime.cuda import Driver

        self.driver = Driver()
        self._compiled = {id(i): c for i, c in zip(wanted, aot.try_compile(wanted, jobs=jobs), strict=True)}

    def bound(self, instance: Instance, arguments: dict[str, Any]) -> Callable[[int], None]:
        """The launch on these arguments, to be called with a stream. Raises CompileFailed and what a launch raises."""
        from moec.runtime.cuda import Kernel
        from moec.runtime.cuda.arguments import Matrix

        compiled = self._compiled[id(instance)]
        if isinstance(compiled, CompileFailed):
            raise compiled
        values = {}
        for name, kind in instance.signature.items():
            value = arguments[name]
            if kind.startswith("tensordesc"):
                value = Matrix(value.data_ptr(), tuple(value.shape), tuple(value.stride()))
            values[name] = value
        return Kernel(self.driver, compiled.record(), compiled.binary).bound(instance.grid(), values)

    def run(self, instance: Instance, arguments: dict[str, Any]) -> None:
        """Launch and wait."""
        import torch

        self.bound(instance, arguments)(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()


def measure(instance: Instance, packed: Packed, flush: Any) -> Row:
    """Times one kernel and, on the same arguments, what torch has for it."""
    import torch

    torch.manual_seed(0)
    problem = DeviceProblem(instance, torch.Generator(), "cuda")
    arguments = move(instance.spec.build(problem), "cuda")
    start = packed.bound(instance, arguments)
    us = timed_us(lambda: start(torch.cuda.current_stream().cuda_stream), flush)
    row = Row(instance.name, sizes(instance), us, instance.flops() / us / 1e6, instance.bytes() / us / 1e3)
    for name, peer in PEERS.get(instance.spec.function, ()):
        try:
            row.peers[name] = timed_us(peer(instance, arguments), flush)
        except Exception as error:
            said = str(error).splitlines() or [""]
            print(f"  {name} beside {instance.name}: {type(error).__name__}: {said[0]}", file=sys.stderr)
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
