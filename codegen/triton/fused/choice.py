"""Which tile a generated product gets: every tile that may fit the architecture, by its predicted time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product as combinations

from moec.codegen.triton.arch import architecture
from moec.codegen.triton.errors import UnmetRequirement
from moec.codegen.triton.fused.binding import tensor_of
from moec.codegen.triton.fused.products import Product, Store
from moec.codegen.triton.spec import Instance, Tile, with_tile
from moec.ir.types import BITS
from moec.targets import Target
from moec.targets.cost.tiles import TiledProduct, tiled_us

BULK_COPIES = ("sm_90a", "sm_100a")
"""Architectures whose copy engine takes tensor descriptors."""
WARPGROUP_ROWS = 64
"""Rows of the smallest tile of wgmma and tcgen05; mma and mfma take 16."""


def depths(product: Product) -> tuple[int, ...]:
    """Columns of a step: those of a scale, or what K is a multiple of."""
    if product.form != "plain":
        return (128,)
    return (64,) if product.inner % 128 else (64, 128)


def start(product: Product) -> Tile:
    """The tile of a product until one is chosen: small enough for every form."""
    return _tile(product, 64, 128 if product.quantises else 64, 64, False, 4, 2)


def _tile(product: Product, height: int, width: int, depth: int, bulk: bool, warps: int, stages: int) -> Tile:
    constants = {"BM": height, "BN": width}
    if product.form == "plain":
        constants["BK"] = depth
    if product.rows != "grouped":
        constants["GROUP_M"] = 8
    if product.boxes:
        constants |= {"TMA": int(bulk), "WS": 0}
    return Tile(constants, warps, stages)


def tiles(product: Product, arch: str) -> Iterator[Tile]:
    """Every tile worth considering, whether or not it fits."""
    heights = (64, 128) if arch in BULK_COPIES else (16, 32, 64, 128)
    widths = (128,) if product.quantises else (32, 64, 128) if product.form != "plain" else (32, 64, 128, 256)
    bulk = (False, True) if arch in BULK_COPIES and product.boxes and not product.wide else (False,)
    for height, width, depth, tma, warps, stages in combinations(
        heights, widths, depths(product), bulk, (4, 8), (2, 3, 4, 5)
    ):
        if warps == 8 and height * width < 64 * 128:
            continue
        yield _tile(product, height, width, depth, tma, warps, stages)


def described(product: Product, instance: Instance) -> TiledProduct:
    """The product with the instance's tile and sizes, as the cost model takes it."""
    tile = instance.tile.constants
    a, b = tensor_of(product.a), tensor_of(product.b)
    a_bytes, b_bytes = BITS[a.dtype] // 8, BITS[b.dtype] // 8
    blocks = 1
    for axis in instance.grid():
        blocks *= axis
    promoted = product.form != "plain"
    # gfx942 widens E4M3 to FP16 in registers: it has no matrix instruction for that format.
    return TiledProduct(
        rate_type="fp8" if product.form == "fp8" and architecture(instance.arch).nvidia else "bf16", blocks=blocks,
        height=tile["BM"], width=tile["BN"], depth=tile.get("BK", 128), k=instance.dims["K"],
        parts=2 if product.pair else 1, a_bytes=a_bytes, b_bytes=b_bytes,
        result_bytes=max(BITS[tensor_of(s.to).dtype] // 8 for s in product.steps if isinstance(s, Store)),
        moved=instance.bytes(), threads=architecture(instance.arch).warp_size * instance.tile.num_warps,
        stages=instance.tile.num_stages, promoted=promoted, bulk=bool(tile.get("TMA")),
    )  # fmt: skip


def ranked(instance: Instance, target: Target, product: Product) -> list[tuple[float, Tile]]:
    """The tiles that fit by their predicted microseconds, the fastest first.

    Of equal ones those with bulk copies, which take fewer registers and instructions, then the smaller.
    """
    found: list[tuple[float, bool, int, int, Tile]] = []
    for tile in tiles(product, instance.arch):
        try:
            other = with_tile(instance, tile)
        except UnmetRequirement:
            continue
        p = described(product, other)
        if (us := tiled_us(target, p)) < float("inf"):
            found.append((round(us, 3), not p.bulk, p.stages * p.stage_bytes, len(found), tile))
    return [(us, tile) for us, *_, tile in sorted(found, key=lambda f: f[:4])]
