"""What the machine allows: its read bandwidth and its rate of fused multiply-adds, measured.

`python -m peers.limits THREADS` prints them as one JSON object.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Limits:
    """Bytes a second that `threads` threads read, and floating-point operations a second that they compute (FP32)."""

    threads: int
    bandwidth: float
    peak: float


def measure(threads: int) -> Limits:
    """The best of several: memchr over buffers far larger than the caches; register tiles from level-1 cache."""
    from cpu_kernels import fma_peak

    from moec.codegen.tvm.tir import Machine
    from moec.targets.detect import measure_read_bandwidth

    return Limits(
        threads, measure_read_bandwidth(threads, rounds=6), 1e9 * fma_peak(Machine(cores=threads), rounds=200)
    )


if __name__ == "__main__":
    print(json.dumps(asdict(measure(int(sys.argv[1])))))
