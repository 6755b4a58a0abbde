"""Declarations of generated kernels: module text, tiles, grid and cost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from moec.codegen.triton.fused.binding import Generated, tensor_of
from moec.codegen.triton.fused.check import build_generated, reference_generated
from moec.codegen.triton.fused.products import Add, Bias, Product, Store
from moec.codegen.triton.spec import Constant, Dims, KernelSpec, Tile, TileTable, on
from moec.codegen.triton.specs.recipe import EVERYWHERE, FP8
from moec.ir import Op, TensorType
from moec.ir.optable import OPS, operand_type
from moec.ir.types import BITS

LIBRARY = {
    "common": ("grouped_order", "load_scale", "quantise_groups", "silu_mul", "limited_silu_mul"),
    "grouped": ("expert_block",),
    "products": (
        "bf16_pair", "bf16_rows", "block_scaled_pair", "block_scaled_rows", "widened_pair", "widened_rows",
    ),
}  # fmt: skip
"""Functions of the library modules that generated text calls."""

BLOCKS = {"BM": 64, "BN": 128}
FEW = {"BM": 64, "BN": 64, "BK": 64}
PRODUCT_TILES: dict[tuple[str, bool, bool], TileTable] = {
    ("fp8", False, False): on(FP8, decode=Tile({"BM": 64, "BN": 64}, 4, 5), prefill=Tile({"BM": 128, "BN": 128}, 8, 4))
    | on(("gfx942",), decode=Tile({"BM": 64, "BN": 64}, 4, 2), prefill=Tile({"BM": 128, "BN": 128}, 8, 2)),
    ("fp8", False, True): on(FP8, decode=Tile(BLOCKS, 4, 4), prefill=Tile({"BM": 128, "BN": 128}, 8, 4))
    | on(("gfx942",), decode=Tile(BLOCKS, 4, 2), prefill=Tile({"BM": 128, "BN": 128}, 8, 2)),
    ("fp8", True, False): on(FP8, any=Tile(BLOCKS, 8, 3)) | on(("gfx942",), any=Tile(BLOCKS, 8, 2)),
    ("plain", False, False): on(("sm_90a", "sm_100a"), decode=Tile(FEW, 4, 4),
                                prefill=Tile({"BM": 128, "BN": 128, "BK": 64}, 8, 4))
    | on(("sm_80",), decode=Tile({"BM": 16, "BN": 64, "BK": 128}, 4, 4),
         prefill=Tile({"BM": 128, "BN": 128, "BK": 64}, 8, 3))
    | on(("gfx942",), decode=Tile({"BM": 16, "BN": 64, "BK": 64}, 4, 2),
         prefill=Tile({"BM": 128, "BN": 128, "BK": 64}, 8, 2)),
    ("plain", True, False): on(("sm_80", "sm_90a", "sm_100a"), any=Tile(FEW, 4, 3))
    | on(("gfx942",), any=Tile(FEW, 4, 1)),
    ("widened", False, False): on(EVERYWHERE, any=Tile({"BM": 64, "BN": 64}, 4, 3)),
    ("widened", True, False): on(EVERYWHERE, any=Tile({"BM": 64, "BN": 64}, 4, 2)),
}  # fmt: skip
"""Tiles by form of the product, whether it is a pair, and whether rows are sorted by expert (where that matters)."""
WIDE_RESULT = on(("sm_90a", "sm_100a"), decode=Tile(FEW, 4, 4), prefill=Tile({"BM": 128, "BN": 64, "BK": 64}, 8, 4))
"""Wider tiles with a float32 result make ptxas serialise the wgmma of the main loop."""

MORE_WARPS = on(("sm_80",), any=Tile({"BM": 64, "BN": 64}, 8, 2))
"""For widened products with more addresses: four warps have too few registers there."""


def module_text(kernel: Generated) -> str:
    """The kernel's file: what it imports, its function. Where it comes from is told when it is written."""
    used = {module: [n for n in names if re.search(rf"\b{n}\(", kernel.source)] for module, names in LIBRARY.items()}
    from_ = "from moec.codegen.triton.kernels."
    imports = [f"{from_}{module} import {', '.join(names)}\n" for module, names in used.items() if names]
    return "import triton\nimport triton.language as tl\n\n" + "".join(imports) + "\n\n" + kernel.source


def rows_spec(kernel: Generated) -> KernelSpec:
    """The declaration of a row-wise kernel."""
    # Rows by columns, by heads and columns, and rotated pairs by heads and dims.
    found = re.findall(r"^    (?:c|d|pair)(?:(\d+)[x_])?(\d+)(?:_\d+i?)? = ", kernel.source, re.MULTILINE)
    widest = max((int(heads or 1) * int(columns) for heads, columns in found), default=64)
    warps = 8 if widest >= 4096 else 4 if widest >= 1024 else 2
    used = [o.type for op in kernel.ops for o in (*op.operands, *op.results)]
    types = {t.dtype for t in used if isinstance(t, TensorType)}
    tiles = on((*FP8, "gfx942") if "fp8_e4m3" in types else EVERYWHERE, any=Tile({}, warps, 1))
    return _spec(kernel, tiles, ("ROWS",), {"ROWS": 1}, (), False, ())


def product_spec(kernel: Generated, product: Product) -> KernelSpec:
    """The declaration of a product."""
    form, grouped = product.form, product.rows == "grouped"
    tiles = PRODUCT_TILES[form, product.pair, grouped and (form, product.pair) == ("fp8", False)]
    results = [tensor_of(v).dtype for v in kernel.outputs]
    if form == "plain" and not product.pair and "f32" in results:
        tiles = {**tiles, **WIDE_RESULT}
    if form == "widened" and (product.transposed or (product.pair and product.columns % 128)):
        tiles = {**tiles, **MORE_WARPS}
    if product.pair and any(isinstance(s, Bias) for s in product.steps):
        # Biases and limits of both halves take a few words more than there are registers.
        tiles = {a: {s: replace(t, spills=max(t.spills, 64)) for s, t in on_.items()} for a, on_ in tiles.items()}
    if not grouped:
        tiles = _with(tiles, {"GROUP_M": 8})
    grid = ("ceildiv(N, BN)", "ROWS // BM") if grouped else ("ceildiv(ROWS, BM) * ceildiv(N, BN)",)
    dims = {"ROWS": 1, **kernel.dims}
    if product.rows == "heads":
        grid, dims = (*grid, "HEADS"), {**dims, "HEADS": int(tensor_of(product.a).shape[1])}  # type: ignore[arg-type]
    if grouped:
        dims["ALIGN"] = 0
    # A tile reaches into two blocks of scales at most.
    widest = ["BN == 128"] if product.quantises else ["BN <= 128"] if form != "plain" else []
    requires = ["K % 16 == 0", *widest]
    step = 128 if form != "plain" else max(t.constants["BK"] for s in tiles.values() for t in s.values())
    tensor_core = tensor_of(product.a).dtype != "f32"
    aligned = tuple(a.name for a in kernel.arguments if a.kind == "i64" or a.name == "K")
    spec = _spec(kernel, tiles, grid, dims, tuple(requires), tensor_core, aligned, step)
    flops, moved = _product_cost(product)
    return replace(spec, flops=flops, bytes=moved)


def _product_cost(product: Product) -> tuple[str, str]:
    """Operations and bytes of one product; of the experts those that own a block of rows are read."""
    pair = 2 if product.pair else 1
    heads = " * HEADS" if product.rows == "heads" else ""
    owners = f"min({tensor_of(product.b).shape[0]}, ROWS // ALIGN) * " if product.rows == "grouped" else ""
    a, b = (BITS[tensor_of(o).dtype] // 8 for o in (product.a, product.b))
    written = sum(BITS[tensor_of(s.to).dtype] // 8 for s in product.steps if isinstance(s, Store))
    read = 2 * sum(isinstance(s, Add) for s in product.steps)
    moved = f"({a} * ROWS * K + {written + read} * ROWS * N){heads}"
    return f"2 * {pair} * ROWS * N * K{heads}", f"{moved} + {owners}{pair * b} * N * K{heads}"


def _with(tiles: TileTable, more: dict[str, int]) -> TileTable:
    return {
        arch: {s: Tile({**t.constants, **more}, t.num_warps, t.num_stages, t.spills) for s, t in shapes.items()}
        for arch, shapes in tiles.items()
    }


def _spec(
    kernel: Generated, tiles: TileTable, grid: tuple[str, ...], dims: Dims, requires: tuple[str, ...],
    tensor_core: bool, aligned: tuple[str, ...], step: int = 0,
) -> KernelSpec:  # fmt: skip
    def constants(given: Dims) -> dict[str, Constant]:
        found: dict[str, Constant] = {"EVEN_K": given["K"] % step == 0} if step else {}
        return found | ({"ALIGN": given["ALIGN"]} if "ALIGN" in given else {})

    return KernelSpec(
        name=kernel.name,
        function=f"{kernel.name}:{kernel.name}",
        ops=tuple(dict.fromkeys(op.name for op in kernel.ops)),
        summary=", ".join(op.name for op in kernel.ops),
        signature={a.name: a.kind for a in kernel.arguments},
        dims=dims,
        constants=constants,
        tiles=tiles,
        grid=grid,
        build=partial(build_generated, kernel=kernel),
        reference=partial(reference_generated, kernel=kernel),
        cases=(),
        flops=_cost(kernel.ops, "flops"),
        bytes=f"{_cost(kernel.ops, 'bytes_read')} + {_cost(kernel.ops, 'bytes_written')}",
        aligned=aligned,
        requires=requires,
        tensor_core=tensor_core,
        source=module_text(kernel),
        loose=tuple(a.name for a in kernel.arguments if a.what == "scale"),
    )


def _cost(ops: Sequence[Op], kind: str) -> str:
    """The sum over the ops, over the run-time symbols; values that stay in registers are counted as if they moved."""
    total = 0
    for op in ops:
        types = [operand_type(o) for o in op.operands]
        total = total + getattr(OPS[op.name], kind)(types, [r.type for r in op.results], op.attrs)
    return str(total)
