"""Generated products at published shapes: DeepGEMM's tables of dense and grouped FP8 products (its README)."""

from __future__ import annotations

from moec.codegen.triton.arch import architecture
from moec.codegen.triton.fused.declare import product_spec
from moec.codegen.triton.fused.products import Product, Store, product_kernel
from moec.codegen.triton.lower.table import KernelTable
from moec.codegen.triton.spec import Instance
from moec.ir import Op, TensorType, Value, WeightRef
from moec.ir.dims import Size, dim
from moec.ir.types import Quant
from moec.targets import Target

DENSE_NK = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
DENSE_M = (64, 128, 4096)
GROUPED = ((4, 8192, 4096, 7168), (4, 8192, 7168, 2048), (8, 4096, 4096, 7168), (8, 4096, 7168, 2048))
"""Experts, rows of each, N, K of the contiguous layout."""
MASKED = ((1, 1024, 4096, 7168), (1, 1024, 7168, 2048), (4, 256, 4096, 7168), (4, 256, 7168, 2048))
"""The same of the masked layout."""
ALIGN = 128


def operand(rows: tuple[Size, ...], k: int, fp8: bool, block: int) -> TensorType:
    """A[rows, K] or B[rows, K], in FP8 with one scale for `block` x 128, or in BF16."""
    return TensorType("fp8_e4m3" if fp8 else "bf16", (*rows, k), Quant("f32", (block, 128)) if fp8 else None)


def product(
    table: KernelTable, rows: int, n: int, k: int, fp8: bool, experts: int = 0, masked: bool = False
) -> Instance:
    """A linear layer over `rows` rows, or that of experts who share them evenly, with the tile that lowering takes."""
    tokens: Size = rows if experts else dim("T")
    weight = WeightRef("w", (), operand((experts, n) if experts else (n,), k, fp8, 128))
    x = Value("x", operand((tokens,), k, fp8, 1))
    y = Value("y", TensorType("bf16", (tokens, n)))
    kind = ("masked" if masked else "grouped" if experts else "dense") + ("" if fp8 else "_bf16")
    name = "moe.experts" if experts else "linear"
    op = Op(name, [x, weight], {}, [y])
    made = Product(x, weight, "grouped" if experts else "dense", (Store(y),), masked=masked)
    kernel = product_kernel(made, kind, [op], str(rows))
    align = {"ALIGN": 0 if masked else ALIGN, "LOAD": -1} if experts else {}
    align |= {"CAPACITY": rows // experts} if masked else {}
    spec = product_spec(kernel, made)
    return table.instance(spec, "prefill" if rows > 128 else "decode", ROWS=rows, T=rows, **align)


def published(target: Target) -> list[Instance]:
    """Every product of the tables that the target has a form for."""
    table, found = KernelTable(target, {}), []
    for fp8 in (True, False) if architecture(table.arch).fp8 else (False,):
        found += [product(table, m, n, k, fp8) for m in DENSE_M for n, k in DENSE_NK]
        if fp8:
            found += [product(table, e * m, n, k, fp8, e) for e, m, n, k in GROUPED]
            found += [product(table, e * m, n, k, fp8, e, masked=True) for e, m, n, k in MASKED]
    return found
