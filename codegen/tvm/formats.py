"""Storage formats of packed weight matrices, and packing in numpy.

The row-lane layout: a 4-byte lane holds `q` consecutive k of one row, in the order [ceil(N/16)][K'/q][16 rows][q k]
with rows and k zero-padded (K' = K rounded up to `k_multiple`). A vector load then holds one k-group of neighbouring
rows, so a matrix-vector product needs neither a permutation of x nor a horizontal sum, and the same bytes unpack
straight into the panels of a blocked matrix product. Matrices stack (experts, heads) as leading dimensions.

Scales of `fp8_e4m3` are float32 [ceil(N/16)][ceil(K/128)], one per row tile and 128 k: finer than the 128x128 blocks
of DeepSeek-V3 (arXiv 2412.19437, sec. 3.3.2), so that matrices concatenated along N keep their own blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

ROWS = 16
"""Rows of a tile, whatever the vector width."""


@dataclass(frozen=True)
class Format:
    """How the elements of a packed matrix are stored."""

    name: str
    storage: str  # numpy dtype of one stored element
    k_multiple: int  # K is zero-padded to a multiple of this
    scale_block: int = 0  # k that share one scale; 0: no scales

    @property
    def per_lane(self) -> int:
        """Consecutive k in one 4-byte lane."""
        return 4 // np.dtype(self.storage).itemsize

    def padded_k(self, k: int) -> int:
        """K' of the layout."""
        return -(-k // self.k_multiple) * self.k_multiple

    def lanes(self, n: int, k: int) -> int:
        """4-byte lanes of one packed matrix."""
        return prod(packed_shape(n, k, self))

    def scales(self, n: int, k: int) -> int:
        """Scales of one packed matrix; 0 when the format has none."""
        return prod(scale_shape(n, k, self)) if self.scale_block else 0


F32 = Format("f32", "float32", 8)
BF16 = Format("bf16", "uint16", 8)
FP8_E4M3 = Format("fp8_e4m3", "uint8", 128, scale_block=128)
FORMATS = {f.name: f for f in (F32, BF16, FP8_E4M3)}


def packed_shape(n: int, k: int, fmt: Format) -> tuple[int, int, int]:
    """Shape in int32 lanes of a packed N x K matrix: [ceil(N/16), K'/q, 16]."""
    return -(-n // ROWS), fmt.padded_k(k) // fmt.per_lane, ROWS


def scale_shape(n: int, k: int, fmt: Format) -> tuple[int, int]:
    """Shape of the scales of an N x K matrix in a scaled format: [ceil(N/16), K'/block]."""
    return -(-n // ROWS), fmt.padded_k(k) // fmt.scale_block


def pack(
    weight: npt.NDArray[Any], fmt: Format, block_scales: npt.NDArray[np.float32] | None = None, block: int = 128
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
    """Pack `weight` [..., N, K] into the row-lane layout.

    `weight` holds stored elements: float32 values, bfloat16 bits as uint16, or E4M3 bytes as uint8. `block_scales`
    [..., ceil(N/block), ceil(K/128)] are the scales by which stored values are multiplied, one per `block` rows (a
    multiple of 16) and 128 k. Returns int32 [..., ceil(N/16), K'/q, 16] and float32 [..., ceil(N/16), K'/128] (None
    without scales). Raises ValueError when dtype or scales do not fit the format.
    """
    *lead, n, k = weight.shape
    if weight.dtype != np.dtype(fmt.storage):
        raise ValueError(f"{fmt.name} packs {fmt.storage} elements, not {weight.dtype}")
    if (block_scales is None) != (fmt.scale_block == 0):
        raise ValueError(f"{fmt.name} {'needs' if fmt.scale_block else 'takes no'} scales")
    tiles, groups, _ = packed_shape(n, k, fmt)
    packed = np.zeros((*lead, tiles, groups, ROWS), np.int32)
    padded = np.zeros((ROWS, fmt.padded_k(k)), weight.dtype)
    source = weight.reshape(-1, n, k)
    for matrix, out in zip(source, packed.reshape(-1, tiles, groups, ROWS), strict=True):
        for tile in range(tiles):
            rows = matrix[tile * ROWS : (tile + 1) * ROWS]
            padded[: len(rows), :k] = rows
            padded[len(rows) :] = 0
            out[tile] = padded.view(np.int32).T
    return packed, None if block_scales is None else _tile_scales(block_scales, n, k, fmt, block)


def _tile_scales(scales: npt.NDArray[np.float32], n: int, k: int, fmt: Format, block: int) -> npt.NDArray[np.float32]:
    """Scales of `block` rows repeated for every tile of 16 rows."""
    expected = (-(-n // block), scale_shape(n, k, fmt)[1])
    if scales.shape[-2:] != expected or block % ROWS:
        raise ValueError(f"scales of {n}x{k}, {block} rows a block, have shape {expected}, not {scales.shape[-2:]}")
    tiles = np.repeat(scales.astype(np.float32, copy=False), block // ROWS, axis=-2)
    return np.ascontiguousarray(tiles[..., : -(-n // ROWS), :])
