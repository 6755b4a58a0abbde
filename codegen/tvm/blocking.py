"""Sizes of the blocked matrix product, from the registers and caches of the machine.

The scheme of Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008) with the roles of the
operands swapped: the weight panel [kc, nr] stays in half of L1 while all row tiles of x pass over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from moec.codegen.tvm.tir import Machine
from moec.ir.lane16 import ROWS

MOST_ROWS_BY_VECTORS = 4
"""Most rows of one row-lane product."""
MOST_ROWS_BESIDE_TILES = 2
"""The same on machines with matrix tiles, to which larger groups go."""
PAD = 16  # keeps rows of a power-of-two length out of one cache set


@dataclass(frozen=True)
class Blocking:
    """Block sizes: rows are rows of x (tokens), columns are rows of the weight (outputs)."""

    tiles: int  # packed 16-row weight tiles side by side in one panel
    vectors: int  # vectors across a panel
    mr: int  # rows of the register tile
    kc: int  # k of a panel
    mc: int  # rows of x kept in L2
    results: int  # floats of the results that share one copy of an x block
    chunk: int  # most rows of one row-lane product
    skinny: int  # up to this many rows chunk by chunk is faster than unpacking a panel

    @property
    def columns(self) -> int:
        """Columns of a panel."""
        return self.tiles * ROWS


@cache
def blocking(machine: Machine) -> Blocking:
    """Block sizes for `machine`: a panel fills half of L1, the x block 9/16 of L2 (256 rows in 512 KiB).

    Results pass through L2 once per panel and may lie in L3; the more of them, the rarer an x block is copied.
    """
    tiles = max(1, 2 * machine.lanes // ROWS)
    columns = tiles * ROWS
    vectors = columns // machine.lanes
    mr = (machine.registers - vectors - 2) // vectors
    kc = max(128, machine.l1_bytes // 2 // (4 * columns) // 128 * 128)
    mc = max(mr, machine.l2_bytes * 9 // 16 // (4 * (kc + PAD)) // mr * mr)
    results = max(machine.l2_bytes // 4, mc * columns)
    chunk = MOST_ROWS_BESIDE_TILES if machine.tiles else MOST_ROWS_BY_VECTORS
    return Blocking(tiles, vectors, mr, kc, mc, results, chunk, skinny=12)


@dataclass(frozen=True)
class TileBlocking:
    """Block sizes of products by matrix tiles; panels have 32 columns."""

    kc: int  # k of a panel
    kx: int  # most k of a block of x
    x: int  # floats of a block of x, split into pairs of BF16 numbers

    def rows(self, k: Any) -> Any:
        """Rows of a block of x with kc <= k <= kx numbers each: whole pairs of tiles."""
        return self.x // k // 32 * 32

    @property
    def results(self) -> int:
        """Floats of the results that share one copy of an x block: a panel's at least."""
        return self.x // 4


@cache
def tile_blocking(machine: Machine) -> TileBlocking:
    """Block sizes for `machine`. Of 128 k a panel (8 KiB), 32 rows of x (16 KiB) and their results fit L1 together,
    whatever the machine, and the panel stays there for all rows. An x block fills half of L2 and results an eighth:
    what lies in L3 is too slow for tiles. A panel is widened once for each x block, so it has 128 rows at least."""
    x = max(machine.l2_bytes // 2 // 4, 128 * 128)
    return TileBlocking(128, x // 128 // 128 * 128, x)
