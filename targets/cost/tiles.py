"""What a matrix product takes with a given tile: the terms of the product model, for kernels that choose their own.

A core holds as many blocks at a time as its registers and shared memory allow, and their steps along k overlap: one
block's loads and promotions hide behind another's matrix instructions. Memory is read at most as fast as the bytes
that all blocks have asked for arrive (Little's law), and operand tiles that several blocks read come out of the
level-2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.targets.cost.physics import ceildiv, fitted, soft_max, throttled
from moec.targets.schema import Target

REGISTERS = {"cuda": (64 * 1024, 255), "rocm": (128 * 1024, 512)}
"""32-bit registers of a core and the most of a thread (CUDA C++ programming guide, compute capabilities 8.0 to 10.0;
CDNA 3 instruction set architecture: four SIMDs of 512 registers of 64 lanes)."""
KEPT = 1024
"""Bytes of shared memory that the system keeps for every block (the same guide, shared memory)."""
ADDRESSES = 64
"""Registers of a thread beside its part of the tile: assumed, from kernels as compiled."""
LATENCY = 0.6e-6
"""Seconds from a load to its data under load: assumed, twice the unloaded latency that arXiv 2402.13499 measured."""
CACHE_BYTES_A_CLOCK = 32
"""From the level-2 cache into a core: assumed, half of the 64 that its path is wide."""
LOAD_INSTRUCTIONS = 3
"""For every 16 bytes that threads load themselves: two of address, one of load."""


@dataclass(frozen=True)
class TiledProduct:
    """`blocks` tiles of `height` x `width` sums over `k` in steps of `depth`, `parts` of them in one block (a pair).

    `a_bytes` and `b_bytes` are those of one element, `moved` what passes between memory and the device at least;
    `promoted`: partial sums are scaled and added outside the matrix units; `bulk`: tiles come by the copy engine.
    """

    rate_type: str
    blocks: int
    height: int
    width: int
    depth: int
    k: int
    parts: int
    a_bytes: int
    b_bytes: int
    result_bytes: int
    moved: int
    threads: int
    stages: int
    promoted: bool
    bulk: bool

    @property
    def stage_bytes(self) -> int:
        """Both operands' tiles of one step."""
        return (self.height * self.a_bytes + self.parts * self.width * self.b_bytes) * self.depth

    @property
    def registers(self) -> int:
        """Of a thread, about: its sums, and as many partial ones where those are promoted."""
        sums = self.height * self.width * (self.parts + self.promoted) // self.threads
        return ADDRESSES + sums

    def resident(self, target: Target) -> int:
        """Blocks that a core holds at a time; 0 when it holds none."""
        registers, most = REGISTERS[target.kind]
        if self.registers > most or self.stages * self.stage_bytes > target.device.shared_bytes:
            return 0
        shared = (int(target.device.shared_bytes) + KEPT) // (self.stages * self.stage_bytes + KEPT)
        return min(shared, registers // (self.threads * self.registers))


def tiled_us(target: Target, p: TiledProduct) -> float:
    """Microseconds of a product with its tile; infinity for a tile that no core holds."""
    numbers = fitted(target, "gemm_fp8" if p.rate_type == "fp8" else "gemm_bf16")
    device = target.device
    held = p.resident(target)
    if held == 0:
        return float("inf")
    rate = device.matrix_rate(p.rate_type) / device.cores * numbers["compute"]
    lanes = device.vector_rate / device.cores
    sums = p.parts * p.height * p.width
    matrix = 2 * sums * p.depth / rate
    vector = 4 * sums / lanes if p.promoted else 0.0
    if not p.bulk:
        vector += LOAD_INSTRUCTIONS * p.stage_bytes / 16 * 2 / lanes
    waiting = LATENCY / max(p.stages - 1, 1)
    alone, overlapped = max(numbers["step"] + matrix + vector, waiting), max(matrix, vector)
    steps, store = ceildiv(p.k, p.depth), p.height * p.width * p.result_bytes / numbers["store"]
    of_core = ceildiv(p.blocks, device.cores)
    rounds, left = divmod(of_core, held)
    busy = rounds * (steps * max(alone, held * overlapped) + store)
    busy += (steps * max(alone, left * overlapped) + store) if left else 0.0
    asked = min(p.blocks, device.cores) * min(of_core, held) * max(p.stages - 1, 1) * p.stage_bytes
    memory = p.moved / min(device.memory_bandwidth * numbers["memory"], asked / LATENCY)
    cache = p.blocks * steps * p.stage_bytes / (CACHE_BYTES_A_CLOCK * device.clock * device.cores)
    slowest = soft_max(throttled(target, busy, numbers["sustained"]), max(memory, cache), numbers["norm"])
    return 1e6 * (numbers["floor"] + slowest)
