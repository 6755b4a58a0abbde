"""Declarations of generated kernels: module text, tiles, grid and cost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from moec.codegen.triton.arch import architecture
from moec.codegen.triton.fused.binding import Generated, tensor_of
from moec.codegen.triton.fused.check import build_generated, reference_generated
from moec.codegen.triton.fused.choice import depths, ranked, start
from moec.codegen.triton.fused.products import Add, Product, Store
from moec.codegen.triton.spec import Constant, Dims, KernelSpec, Tile, TileTable, on
from moec.codegen.triton.specs.recipe import EVERYWHERE, FP8
from moec.ir import Op, TensorType
from moec.ir.optable import OPS, operand_type
from moec.ir.types import BITS

LIBRARY = {
    "common": ("grouped_order", "load_scale", "quantise_groups", "silu_mul", "limited_silu_mul"),
    "grouped": ("expert_block",),
    "products": ("product_pair", "product_rows"),
}  # fmt: skip
"""Functions of the library modules that generated text calls."""


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
    moved = f"{_cost(kernel.ops, 'bytes_read')} + {_cost(kernel.ops, 'bytes_written')}"
    return _spec(kernel, tiles, ("ROWS",), {"ROWS": 1}, (), False, (), (_cost(kernel.ops, "flops"), moved))


def product_spec(kernel: Generated, product: Product) -> KernelSpec:
    """The declaration of a product."""
    form, grouped = product.form, product.rows == "grouped"
    known = [a for a in EVERYWHERE if form != "fp8" or architecture(a).fp8]
    tiles = {a: dict.fromkeys(("decode", "prefill"), start(product)) for a in known}
    blocks = ("ceildiv(CAPACITY, BM)", "E") if product.masked else ("ROWS // BM",)
    grid = ("ceildiv(N, BN)", *blocks) if grouped else ("ceildiv(ROWS, BM) * ceildiv(N, BN)",)
    dims = {"ROWS": 1, **kernel.dims}
    if product.rows == "heads":
        grid, dims = (*grid, "HEADS"), {**dims, "HEADS": int(tensor_of(product.a).shape[1])}  # type: ignore[arg-type]
    if grouped:
        dims["ALIGN"] = 0 if product.masked else 64
    if product.masked:
        dims |= {"CAPACITY": 1, "E": int(tensor_of(product.b).shape[0])}  # type: ignore[arg-type]
    # A tile reaches into two blocks of scales at most.
    widest = ["BN == 128"] if product.quantises else ["BN <= 128"] if form != "plain" else []
    requires = ["K % 16 == 0", *widest, *(["ALIGN % BM == 0"] if grouped else [])]
    tensor_core = not product.wide
    aligned = tuple(a.name for a in kernel.arguments if a.kind == "i64" or a.name == "K")
    spec = _spec(kernel, tiles, grid, dims, tuple(requires), tensor_core, aligned, _product_cost(product),
                 depths(product)[-1])  # fmt: skip
    return replace(spec, boxes=product.boxes, menu=partial(ranked, product=product))


def _product_cost(product: Product) -> tuple[str, str]:
    """Operations and bytes of one product; of the experts those that own a block of rows are read."""
    pair = 2 if product.pair else 1
    heads = " * HEADS" if product.rows == "heads" else ""
    experts = tensor_of(product.b).shape[0]
    owners = f"{experts} * " if product.masked else f"min({experts}, ROWS // ALIGN) * "
    owners = owners if product.rows == "grouped" else ""
    a, b = (BITS[tensor_of(o).dtype] // 8 for o in (product.a, product.b))
    written = sum(BITS[tensor_of(s.to).dtype] // 8 for s in product.steps if isinstance(s, Store))
    read = 2 * sum(isinstance(s, Add) for s in product.steps)
    moved = f"({a} * ROWS * K + {written + read} * ROWS * N){heads}"
    return f"2 * {pair} * ROWS * N * K{heads}", f"{moved} + {owners}{pair * b} * N * K{heads}"


def _spec(
    kernel: Generated, tiles: TileTable, grid: tuple[str, ...], dims: Dims, requires: tuple[str, ...],
    tensor_core: bool, aligned: tuple[str, ...], cost: tuple[str, str], step: int = 0,
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
        flops=cost[0],
        bytes=cost[1],
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
