"""What the machine allows: its read bandwidth and its rate of fused multiply-adds, measured.

`python -m peers.limits THREADS` prints them as one JSON object.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Limits:
    """Bytes a second that `threads` threads read, and floating-point operations a second that they compute: by FP32
    vectors, and by matrix tiles of BF16 numbers (0 without such)."""

    threads: int
    bandwidth: float
    peak: float
    tiles: float = 0.0


def measure(threads: int) -> Limits:
    """The best of several: memcmp and a kernel over memory far larger than the caches; operations on registers."""
    from dataclasses import replace

    from cpu_kernels import fma_peak, read_bandwidth, tile_peak

    from moec import targets
    from moec.codegen.tvm.compile import machine_of
    from moec.runtime.machine import allow_tiles
    from moec.targets.read_bandwidth import measure_read_bandwidth

    machine = replace(machine_of(targets.load("cpu")), cores=threads)
    bandwidth = max(measure_read_bandwidth(threads, rounds=6), read_bandwidth(machine, rounds=4))
    allow_tiles()
    return Limits(threads, bandwidth, 1e9 * fma_peak(machine, rounds=20), 1e9 * tile_peak(machine, rounds=5))


if __name__ == "__main__":
    print(json.dumps(asdict(measure(int(sys.argv[1])))))
