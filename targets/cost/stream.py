"""Memory-bound kernels: norms, activations, the router."""

from __future__ import annotations

from moec.targets.cost.gemm import gemm
from moec.targets.cost.physics import fitted
from moec.targets.cost.result import Cost
from moec.targets.schema import Target


def stream(target: Target, size: int, flops: int) -> Cost:
    """A kernel that moves `size` bytes of device memory and does `flops` on the vector units meanwhile."""
    numbers, device = fitted(target, "stream"), target.device
    memory = size / (device.memory_bandwidth * numbers["memory"]) * 1e6
    compute = flops / device.vector_rate * 1e6
    floor = numbers["floor"] * 1e6
    parts = {"latency": floor, "memory": memory, "compute": compute}
    return Cost(floor + max(memory, compute), float(flops), size, parts=parts)


def router(target: Target, tokens: int, hidden: int, experts: int) -> Cost:
    """Gate product, then scores, groups and top-k in one kernel over FP32 scores."""
    scores = stream(target, 8 * tokens * experts, 8 * tokens * experts)
    return gemm(target, tokens, experts, hidden, "bf16", False) + scores
