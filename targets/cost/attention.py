"""Multi-head latent attention: decode over the latent cache, and prefill in the absorbed or the plain form.

Absorbed: every head attends to the shared latent (rank + rope wide keys, rank wide values). Plain: each head has its
own keys (nope + rope) and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moec.targets.cost.physics import ceildiv, fitted, least_rows, soft_max, throttled
from moec.targets.cost.result import Cost
from moec.targets.schema import Target

# Tokens that one step of the kernel takes, and that it gives to one part of a split context at least.
_BLOCK = 64
_SPLIT = 256


@dataclass(frozen=True)
class Widths:
    """Key and value widths of one head, in elements; `shared` when all heads read one latent key and value."""

    key: int
    value: int
    shared: bool


def widths(form: str, kv_rank: int, rope: int, nope: int, value: int) -> Widths:
    """The widths of the `absorbed` or `plain` form."""
    if form == "absorbed":
        return Widths(kv_rank + rope, kv_rank, True)
    return Widths(nope + rope, value, False)


def mla_decode(target: Target, batch: int, context: int, heads: int, kv_dtype: str, wide: Widths, queries: int) -> Cost:
    """`queries` new tokens per request against `context` cached tokens, `heads` heads on this device.

    The heads fill tiles of the matrix units; when the tiles leave cores idle, the context is split and a second
    kernel adds up the parts. An FP8 cache is first cast to BF16, as the measured kernels do.
    """
    numbers, device = fitted(target, "mla_decode"), target.device
    least = least_rows(target)
    rows = ceildiv(heads * queries, least) * least
    tiles = batch * (rows // least)
    # CPUs with AMX attend to the latent cache on matrix tiles; all else of a CPU's attention is FP32 on vector units.
    peak = device.matrix_rate("bf16") if target.kind != "cpu" or "amx_bf16" in device.isa else device.vector_rate
    rate = peak / device.cores * numbers["compute"]
    splits = max(1, min(device.cores // tiles, ceildiv(context, _SPLIT)))
    latent = 2 * batch * context * (wide.key if wide.shared else wide.key + wide.value)
    # Queries come out of the cache, where the kernel before left them. Contexts of two parts and more go through the
    # second kernel even when they are not cut: it reads the parts, or passes over the results once more.
    results = batch * heads * queries * wide.value
    partial = 4 * results * splits if splits > 1 else 0
    second = (partial or 4 * results) if context >= 2 * _SPLIT else 0
    moved = latent + 2 * results + partial
    turns = max(1.0, tiles * splits / device.cores)
    tokens = max(ceildiv(ceildiv(context, _BLOCK), splits) * _BLOCK, min(context, _SPLIT))
    busy = turns * 2 * least * tokens * (wide.key + wide.value) / rate
    busy = throttled(target, busy, fitted(target, "power")["sustained"])
    bandwidth = device.memory_bandwidth * fitted(target, "memory")["achieved"]
    memory = moved / bandwidth
    memory += memory * numbers["ramp"] / (memory + numbers["ramp"])
    floor = numbers["floor"] + turns * numbers["tile"]
    if second:
        floor += numbers["combine"] + second / bandwidth
    flops = 2.0 * batch * heads * queries * context * (wide.key + wide.value)
    time = floor + soft_max(busy, memory, numbers["norm"])
    parts = {"latency": floor * 1e6, "compute": busy * 1e6, "memory": memory * 1e6}
    cost = Cost(time * 1e6, flops, moved + second, parts=parts)
    return cost + _cast(target, numbers, batch * context * wide.key) if kv_dtype == "fp8" else cost


def _cast(target: Target, numbers: Mapping[str, float], elements: int) -> Cost:
    moved = 3 * elements
    memory = moved / (target.device.memory_bandwidth * numbers["cast"]) * 1e6
    floor = numbers["cast_floor"] * 1e6
    return Cost(floor + memory, 0.0, moved, parts={"latency": floor, "memory": memory})


def mla_prefill(target: Target, batch: int, new_tokens: int, context: int, heads: int, wide: Widths) -> Cost:
    """`new_tokens` per request, causal among themselves, after `context - new_tokens` earlier ones."""
    numbers, device = fitted(target, "mla_prefill"), target.device
    pairs = new_tokens * (context - new_tokens) + new_tokens * (new_tokens + 1) // 2
    per_pair = 2 * (wide.key + wide.value)
    flops = float(batch * heads * pairs * per_pair)
    computed = batch * heads * (pairs + new_tokens * numbers["block"]) * per_pair
    peak = device.vector_rate if target.kind == "cpu" else device.matrix_rate("bf16")
    busy = computed / (peak * numbers["compute"])
    latent = batch * context * (wide.key if wide.shared else heads * (wide.key + wide.value))
    moved = 2 * (latent + batch * heads * new_tokens * (wide.key + wide.value))
    memory = moved / (device.memory_bandwidth * numbers["memory"])
    time = numbers["floor"] + soft_max(busy, memory, numbers["norm"])
    parts = {"latency": numbers["floor"] * 1e6, "compute": busy * 1e6, "memory": memory * 1e6}
    return Cost(time * 1e6, flops, moved, parts=parts)
