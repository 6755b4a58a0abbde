"""The experts of one device: gate and up product, SwiGLU with quantisation, down product, over the busy experts."""

from __future__ import annotations

from moec.targets.cost.gemm import grouped_gemm, operands
from moec.targets.cost.physics import fitted
from moec.targets.cost.result import Cost
from moec.targets.schema import Target


def moe_experts(target: Target, rows: int, experts: int, hidden: int, inter: int, dtype: str, layout: str) -> Cost:
    """`rows` token-expert pairs spread evenly over `experts`; with fewer rows than experts only some are read."""
    numbers = fitted(target, "experts")
    busy = min(experts, rows)
    shares = [rows // busy + (index < rows % busy) for index in range(busy)]
    up = grouped_gemm(target, shares, 2 * inter, hidden, dtype, layout)
    down = grouped_gemm(target, shares, hidden, inter, dtype, layout)
    moved = rows * inter * (4 + operands(target, dtype).activation)
    memory = moved / (target.device.memory_bandwidth * numbers["memory"]) * 1e6
    floor = (numbers["floor"] + experts * numbers["expert"]) * 1e6
    between = Cost(floor + memory, 4.0 * rows * inter, moved, parts={"latency": floor, "memory": memory})
    return up + between + down
