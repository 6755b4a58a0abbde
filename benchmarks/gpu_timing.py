"""Times of kernels on a GPU, beside torch on the same problem."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from gpu_peers import PEERS
from gpu_predict import sizes
from gpu_shapes import published

from moec.codegen.triton import aot
from moec.codegen.triton.errors import CompileFailed
from moec.codegen.triton.problem import Problem, matrices, move
from moec.codegen.triton.spec import Instance, registry
from moec.targets import Target

WARM_UP, REPEATS = 3, 30


@dataclass
class Row:
    """One line of the table: a kernel at one size."""

    kernel: str
    sizes: str
    microseconds: float
    tflops: float
    gbytes_per_s: float
    peers: dict[str, float] = field(default_factory=dict)


def wanted(target: Target) -> list[Instance]:
    """What is timed: products at DeepGEMM's published shapes, decode at FlashMLA's, the rest as declared."""
    arch, found = target.device.arch, published(target)
    for spec in registry().values():
        for shape in spec.tiles.get(arch, {}):
            if spec.name.startswith("mla_decode_split"):
                found += [spec.instance(arch, shape, CONTEXT=c, QUERIES=q) for c in (1024, 4096, 8192) for q in (1, 2)]
            else:
                found.append(spec.instance(arch, shape))
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

        compiled = self._compiled[id(instance)]
        if isinstance(compiled, CompileFailed):
            raise compiled
        kernel = Kernel(self.driver, compiled.record(), compiled.binary)
        return kernel.bound(instance.grid(), matrices(instance, arguments))

    def run(self, instance: Instance, arguments: dict[str, Any]) -> None:
        """Launch and wait."""
        import torch

        self.bound(instance, arguments)(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()


def measure(instance: Instance, packed: Packed, flush: Any) -> Row:
    """Times one kernel and, on the same arguments, what torch has for it."""
    import torch

    torch.manual_seed(0)
    try:
        arguments = move(instance.spec.build(DeviceProblem(instance, torch.Generator(), "cuda")), "cuda")
    except RuntimeError as error:
        # A problem that mixes host and device: made on the host it only takes longer.
        print(f"  {instance.name}: made on the host ({str(error).splitlines()[0]})", file=sys.stderr)
        arguments = move(instance.spec.build(Problem(instance, torch.Generator(), "cuda")), "cuda")
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
