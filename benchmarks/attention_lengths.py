"""Time of absorbed attention over the latent cache against its length, one layer of one decoding sequence.

Run: python benchmarks/attention_lengths.py [--heads 16] [--lengths 1024,...] [--cache bf16,fp8] [--threads 1,2]

Calls go round a pool of layers that no cache holds, as a model's layers do. Beside each time stands what the measured
read bandwidth takes for its bytes and what the target's FP32 rate takes for its operations.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count()))

import numpy as np
import torch
import tvm
from cpu_kernels import compiled

from moec import targets
from moec.codegen.tvm.cache import CacheLayout
from moec.codegen.tvm.compile import machine_of
from moec.codegen.tvm.mla_decode import MlaDecodeSpec, build_mla_decode, scratch_elements
from moec.runtime.machine import allow_tiles
from moec.targets.read_bandwidth import measure_read_bandwidth

RANK, ROPE, PAGE = 512, 64, 64
POOL = 256 << 20
"""Bytes of the pool, at least."""


def measure(heads: int, dtype: str, lengths: Sequence[int], threads: int, repeat: int) -> list[dict[str, Any]]:
    """A row for each length."""
    target = targets.load("cpu")
    machine = machine_of(target)
    most = -(-max(lengths) // PAGE)
    layout = CacheLayout(RANK, ROPE, dtype, most, PAGE)
    width = RANK + ROPE
    spec = MlaDecodeSpec(
        heads, layout, 0.05, 1, heads * RANK, RANK, heads * ROPE, ROPE, heads * RANK, RANK,
    )  # fmt: skip
    run = compiled(build_mla_decode(spec, machine), machine)
    rng = np.random.default_rng(0)
    q, q_rope, out = (torch.randn(heads * n) for n in (RANK, ROPE, RANK))
    layer, size = most * PAGE * layout.row, 1 if dtype == "fp8" else 2
    layers = max(2, -(-POOL // (layer * size)))
    if size == 1:
        # Small E4M3 numbers everywhere: scales and rotary keys are finite whatever the bytes.
        pool = torch.from_numpy(rng.integers(0x30, 0x40, layers * layer, dtype=np.uint8))
    else:
        pool = torch.from_numpy(
            (rng.standard_normal(layers * layer, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        )
    pages, seq = torch.from_numpy(rng.permutation(most).astype(np.int32)), torch.zeros(1, dtype=torch.int32)
    scratch = torch.zeros(scratch_elements(spec, machine))
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    bandwidth = measure_read_bandwidth(threads)
    peak = target.device.vector_rate * threads / float(target.device.cores)
    rows = []
    warm, middle = time.perf_counter() + 0.2, torch.tensor([max(lengths) // 2], dtype=torch.int32)
    while time.perf_counter() < warm:  # until the threads have found their cores
        run(q, 0, q_rope, 0, pool, 0, pages, 0, seq, 0, middle, 0, out, 0, scratch, 0, 1)
    for length in lengths:
        pos = torch.tensor([length - 1], dtype=torch.int32)
        times = []
        for i in range(repeat + 2):
            begin = time.perf_counter()
            run(q, 0, q_rope, 0, pool, i % layers * layer, pages, 0, seq, 0, pos, 0, out, 0, scratch, 0, 1)
            times.append(time.perf_counter() - begin)
        us = median(times[2:]) * 1e6
        nbytes = length * layout.row * size
        flops = 2 * length * heads * (width + RANK)
        least = max(nbytes / bandwidth, flops / peak) * 1e6
        rows.append(
            {
                "cache": dtype, "heads": heads, "threads": threads, "length": length, "us": us, "mb": nbytes / 1e6,
                "bytes_us": nbytes / bandwidth * 1e6, "flops_us": flops / peak * 1e6, "of_bound": least / us,
            }
        )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--cache", default="bf16,fp8")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args(argv)
    allow_tiles()
    lengths = [int(n) for n in o.lengths.split(",")]
    rows = [
        row
        for dtype in o.cache.split(",")
        for threads in (int(n) for n in o.threads.split(","))
        for row in measure(o.heads, dtype, lengths, threads, o.repeat)
    ]
    if o.json:
        print(json.dumps({"rows": rows}))
        return 0
    head = ("threads", "length", "us", "us/1k", "bytes us", "flops us", "of bound")
    print("cache  " + " ".join(f"{name:>{n}}" for name, n in zip(head, (7, 7, 9, 7, 9, 9, 8), strict=True)))
    for r in rows:
        print(
            f"{r['cache']:6} {r['threads']:7} {r['length']:7} {r['us']:9,.0f} {r['us'] / r['length'] * 1024:7.1f} "
            f"{r['bytes_us']:9,.0f} {r['flops_us']:9,.0f} {r['of_bound']:8.0%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
