"""The row-lane layout `lane16`: how packed matrices lie in memory, for whoever packs, stores or reads them.

A 4-byte lane holds `q` consecutive k of one row, in the order [ceil(N/16)][K'/q][16 rows][q k] with rows and k
zero-padded (K' = K rounded up to `k_multiple`). A vector load then holds one k-group of neighbouring rows, so a
matrix-vector product needs neither a permutation of x nor a horizontal sum, and the same bytes unpack straight into
the panels of a blocked matrix product. Matrices stack (experts, heads) as leading dimensions. Elements of four bits
fill a lane from its lowest bits on.

Scales: of FP8 float32 [ceil(N/16)][K'/128], one per tile of rows and 128 k: finer than the 128x128 blocks of
DeepSeek-V3 (arXiv 2412.19437, sec. 3.3.2), so that matrices joined along N keep their own blocks; one for each row,
[ceil(N/16)][K'/128][16], where blocks do not hold whole tiles. Of MXFP4 one byte
for each row and 32 k, [ceil(N/16)][K'/32][16]: the exponent of a power of two plus 127 (OCP Microscaling Formats
specification 1.0, sec. 5.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

ROWS = 16
"""Rows of a tile, whatever the vector width."""


@dataclass(frozen=True)
class Format:
    """How the elements of a packed matrix are stored. `scale_block`: k that share one scale; 0: there are none."""

    name: str
    bits: int
    k_multiple: int
    scale_block: int = 0
    row_scales: bool = False
    """Every row has scales of its own; otherwise tiles of rows share them."""
    scale_dtype: str = "float32"
    """Element type of the scales as a kernel sees them: float32, or uint8 that holds an exponent."""

    @property
    def per_lane(self) -> int:
        """Consecutive k in one 4-byte lane."""
        return 32 // self.bits

    @property
    def block_scales(self) -> int:
        """Scales of one tile of rows and `scale_block` k."""
        return ROWS if self.row_scales else 1

    def padded_k(self, k: int) -> int:
        """K' of the layout."""
        return -(-k // self.k_multiple) * self.k_multiple

    def shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Shape in 4-byte lanes of a packed N x K matrix: [ceil(N/16), K'/q, 16]."""
        return -(-n // ROWS), self.padded_k(k) // self.per_lane, ROWS

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of the scales of an N x K matrix in a scaled format."""
        blocks = (-(-n // ROWS), self.padded_k(k) // self.scale_block)
        return (*blocks, ROWS) if self.row_scales else blocks

    def lanes(self, n: int, k: int) -> int:
        """4-byte lanes of one packed matrix."""
        return prod(self.shape(n, k))

    def scales(self, n: int, k: int) -> int:
        """Scales of one packed matrix; 0 when the format has none."""
        return prod(self.scale_shape(n, k)) if self.scale_block else 0


F32 = Format("f32", 32, 8)
BF16 = Format("bf16", 16, 32)
FP8_E4M3 = Format("fp8_e4m3", 8, 128, scale_block=128)
FP8_E4M3_ROWS = Format("fp8_e4m3_rows", 8, 128, scale_block=128, row_scales=True)
"""For scale blocks that begin or end inside a tile of rows, or that are single rows."""
MXFP4 = Format("fp4_e2m1", 4, 128, scale_block=32, row_scales=True, scale_dtype="uint8")
FORMATS = {f.name: f for f in (F32, BF16, FP8_E4M3, MXFP4)}
"""Formats by element type."""


def format_of(dtype: str, block_rows: int = ROWS) -> Format:
    """The format of an element type whose scale blocks have `block_rows` rows (0: all of them)."""
    return FP8_E4M3_ROWS if dtype == "fp8_e4m3" and block_rows % ROWS else FORMATS[dtype]
