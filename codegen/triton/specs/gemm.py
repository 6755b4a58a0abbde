"""Declarations of the matrix products."""

from __future__ import annotations

from typing import Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.recipe import (
    BF16_ROUNDING,
    FP8,
    quantise_1x128,
    quantise_128x128,
    wide,
    wide_blocks,
)

FLOAT = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*fp32")
FP8_SIGNATURE = {
    "a_ptr": "*fp8e4nv", "a_scale_ptr": "*fp32", "b_ptr": "*fp8e4nv", "b_scale_ptr": "*fp32", "c_ptr": "*bf16",
    "M": "i32", "N": "i32", "K": "i32",
}  # fmt: skip
BOX = {"a_desc": "tensordesc<fp8e4nv[{BM}, 128]>", "b_desc": "tensordesc<fp8e4nv[{BN}, 128]>"}
TMA_SIGNATURE = {
    "a_desc": BOX["a_desc"], "a_scale_ptr": "*fp32", "b_desc": BOX["b_desc"], "b_scale_ptr": "*fp32", "c_ptr": "*bf16",
    "M": "i32", "N": "i32", "K": "i32",
}  # fmt: skip
FP8_BYTES = "M*K + 4*M*ceildiv(K, 128) + N*K + 4*ceildiv(N, 128)*ceildiv(K, 128) + 2*M*N"
GEMM_GRID = ("ceildiv(M, BM) * ceildiv(N, BN)",)
SHAPES = {"decode": {"M": 64}, "prefill": {"M": 4096}}
FP8_CASES = (
    Case("one token", {"M": 1, "N": 256, "K": 256}),
    Case("ragged rows and columns", {"M": 70, "N": 192, "K": 384}),
    Case("last block of K half full", {"M": 33, "N": 128, "K": 448}),
    Case("float32 out", {"M": 40, "N": 256, "K": 640}, {"c_ptr": "*fp32"}),
    Case("zero and subnormal rows", {"M": 16, "N": 128, "K": 256, "SMALL": 1}),
)


def fp8_operands(p: Problem) -> dict[str, Any]:
    a = p.normal(p.M, p.K)
    if p.instance.dims.get("SMALL"):
        # Beside a row of zeros: elements that E4M3 holds as subnormals, next to one that sets the scale.
        a[0] = 0.0
        a[1:] *= 2.0**-12
        a[1:, ::128] = 1.0
    q, scale = quantise_1x128(a)
    w, w_scale = quantise_128x128(p.normal(p.N, p.K, scale=p.K**-0.5))
    return {"a": q, "a_scale": scale, "b": w, "b_scale": w_scale}


def build_fp8(p: Problem) -> dict[str, Any]:
    x = fp8_operands(p)
    form = "desc" if "a_desc" in p.instance.signature else "ptr"
    return {
        f"a_{form}": x["a"], "a_scale_ptr": x["a_scale"], f"b_{form}": x["b"], "b_scale_ptr": x["b_scale"],
        "c_ptr": p.output("c_ptr", p.M, p.N), "M": p.M, "N": p.N, "K": p.K,
    }  # fmt: skip


def product_bound(p: Problem, argument: str = "c_ptr") -> tuple[float, float, float]:
    """Relative and absolute bound of a product rounded to the argument's type, and its absolute bound on a GPU.

    Hopper's FP8 products keep 13 fraction bits in the sum of 32 (arXiv 2505.09343, sec. 3.1): 2e-3 of the root mean
    square covers the tail of many elements; BF16 products add in float32.
    """
    rounding = BF16_ROUNDING * 1.001 if p.instance.signature[argument] == "*bf16" else 0.0
    return rounding, 2e-6, 5e-3


def reference_fp8(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    a = x["a_desc"] if "a_desc" in x else x["a_ptr"]
    b = x["b_desc"] if "b_desc" in x else x["b_ptr"]
    return {"c_ptr": Expected(wide(a, x["a_scale_ptr"]) @ wide_blocks(b, x["b_scale_ptr"]).T, *product_bound(p))}


def fp8_constants(dims: Dims) -> dict[str, Constant]:
    return {"EVEN_K": dims["K"] % 128 == 0}


def no_constants(dims: Dims) -> dict[str, Constant]:
    return {}


FP8_GEMM = KernelSpec(
    name="fp8_gemm",
    function="gemm:fp8_gemm",
    ops=("linear",),
    summary="Linear layer, 1x128 by 128x128 FP8, float32 promotion every 128; pointer loads",
    signature=FP8_SIGNATURE,
    dims={"M": 64, "N": 4096, "K": 7168},
    shape_dims=SHAPES,
    constants=fp8_constants,
    tiles=on(
        FP8,
        decode=Tile({"BM": 64, "BN": 64, "GROUP_M": 8}, 4, 5),
        prefill=Tile({"BM": 128, "BN": 128, "GROUP_M": 8}, 8, 4),
    )
    | on(
        ("gfx942",),
        decode=Tile({"BM": 64, "BN": 64, "GROUP_M": 8}, 4, 2),
        prefill=Tile({"BM": 128, "BN": 128, "GROUP_M": 8}, 8, 2),
    ),
    grid=GEMM_GRID,
    build=build_fp8,
    reference=reference_fp8,
    cases=FP8_CASES,
    flops="2*M*N*K",
    bytes=FP8_BYTES,
    aligned=("N", "K"),
    requires=("K % 16 == 0", "N % 16 == 0"),
    tensor_core=True,
    fallback="bf16_gemm",
)


def tma(
    name: str, specialise: bool, summary: str, decode: Tile, prefill: Tile, archs: tuple[str, ...] = FP8
) -> KernelSpec:
    def constants(dims: Dims) -> dict[str, Constant]:
        return {"SPECIALISE": specialise}

    return KernelSpec(
        name=name,
        function="gemm:fp8_gemm_tma",
        ops=("linear",),
        summary=summary,
        signature=TMA_SIGNATURE,
        dims={"M": 64, "N": 4096, "K": 7168},
        shape_dims=SHAPES,
        constants=constants,
        tiles=on(archs, decode=decode, prefill=prefill),
        grid=GEMM_GRID,
        build=build_fp8,
        reference=reference_fp8,
        cases=FP8_CASES[:3],
        flops="2*M*N*K",
        bytes=FP8_BYTES,
        aligned=("N", "K"),
        requires=("K % 16 == 0", "N % 16 == 0"),
        tensor_core=True,
        fallback="fp8_gemm_tma" if specialise else "bf16_gemm",
    )


FP8_GEMM_TMA = tma(
    "fp8_gemm_tma", False, "The same linear layer, operands through tensor-memory descriptors",
    Tile({"BM": 64, "BN": 64, "GROUP_M": 8}, 4, 5), Tile({"BM": 128, "BN": 128, "GROUP_M": 8}, 8, 4),
)  # fmt: skip
# On sm_100a the specialised form takes more registers for a block than a multiprocessor has.
FP8_GEMM_TMA_WS = tma(
    "fp8_gemm_tma_ws", True, "The same linear layer, descriptors and warps specialised for loading",
    Tile({"BM": 64, "BN": 64, "GROUP_M": 8}, 4, 4), Tile({"BM": 128, "BN": 128, "GROUP_M": 8}, 4, 3), ("sm_90a",),
)  # fmt: skip


def build_bf16(p: Problem) -> dict[str, Any]:
    """A batch axis between rows and columns of A and C: the heads of a token, as in the absorbed projections."""
    batch, m, n, k = p.B, p.M, p.N, p.K
    a = p.put("a_ptr", p.normal(m, batch, k))
    shape = (batch, n, k) if p.B_IS_NK else (batch, k, n)
    return {
        "a_ptr": a, "b_ptr": p.put("b_ptr", p.normal(*shape, scale=k**-0.5)), "c_ptr": p.output("c_ptr", m, batch, n),
        "M": m, "N": n, "K": k, "lda": batch * k, "ldb": shape[2], "ldc": batch * n,
        "a_batch": k, "b_batch": n * k, "c_batch": n,
    }  # fmt: skip


def reference_bf16(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    import torch

    form = "mbk,bnk->mbn" if p.B_IS_NK else "mbk,bkn->mbn"
    rounding, absolute, _ = product_bound(p)
    value = torch.einsum(form, x["a_ptr"].double(), x["b_ptr"].double())
    return {"c_ptr": Expected(value, rounding, absolute, 2e-5)}


def bf16(
    name: str, ops: tuple[str, ...], summary: str, dims: Dims, nk: bool, out: str, cases: tuple[Case, ...]
) -> KernelSpec:
    def constants(dims: Dims) -> dict[str, Constant]:
        return {"B_IS_NK": nk, "EVEN_K": dims["K"] % 128 == 0}

    # A gate has as many columns as there are experts, of any number: its stores are few and need no alignment.
    ragged = out == "*fp32"
    decode = {"BM": 64, "BN": 64, "BK": 64, "GROUP_M": 8}
    prefill = {"BM": 128, "BN": 128, "BK": 64, "GROUP_M": 8}
    # Wider tiles with a float32 result make ptxas serialise the wgmma of the main loop.
    many = {"BM": 128, "BN": 64, "BK": 64, "GROUP_M": 8} if ragged else prefill
    few = {"BM": 16, "BN": 64, "BK": 128, "GROUP_M": 8}
    return KernelSpec(
        name=name,
        function="gemm:bf16_gemm",
        ops=ops,
        summary=summary,
        signature={"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": out, **dict.fromkeys(("M", "N", "K"), "i32"),
                   **dict.fromkeys(("lda", "ldb", "ldc", "a_batch", "b_batch", "c_batch"), "i64")},
        dims=dims,
        shape_dims=SHAPES,
        constants=constants,
        tiles=on(("sm_90a", "sm_100a"), decode=Tile(decode, 4, 4), prefill=Tile(many, 8, 4))
        | on(("sm_80",), decode=Tile(few, 4, 4), prefill=Tile(prefill, 8, 3))
        | on(("gfx942",), decode=Tile(few | {"BK": 64}, 4, 2), prefill=Tile(prefill, 8, 2)),
        grid=("ceildiv(M, BM) * ceildiv(N, BN)", "B"),
        build=build_bf16,
        reference=reference_bf16,
        cases=cases,
        flops="2*B*M*N*K",
        bytes="2*B*(M*K + N*K) + " + ("4" if ragged else "2") + "*B*M*N",
        aligned=("K", "lda", "ldb", "a_batch", "b_batch", *(() if ragged else ("N", "ldc", "c_batch"))),
        requires=("K % 16 == 0",) if ragged else ("K % 16 == 0", "N % 16 == 0"),
        tensor_core=True,
    )  # fmt: skip


BF16_GEMM = bf16(
    "bf16_gemm", ("linear",), "Linear layer in BF16", {"B": 1, "M": 64, "N": 4096, "K": 7168}, True, "*bf16",
    (
        Case("one token", {"M": 1, "N": 192, "K": 256}),
        Case("ragged", {"M": 70, "N": 80, "K": 176}),
        Case("float32 throughout", {"M": 20, "N": 64, "K": 192}, FLOAT, interpreted=True),
    ),
)  # fmt: skip
BF16_GEMM_F32 = bf16(
    "bf16_gemm_f32", ("linear",), "Linear layer in BF16 with float32 result: gate and output head",
    {"B": 1, "M": 64, "N": 256, "K": 7168}, True, "*fp32",
    (Case("gate of 17 tokens", {"M": 17, "N": 256, "K": 512}), Case("9 experts", {"M": 3, "N": 9, "K": 128})),
)  # fmt: skip
BF16_HEADS_NK = bf16(
    "bf16_heads_nk", ("linear.heads",), "One product per head, weights [N, K]: absorbed value projection",
    {"B": 128, "M": 64, "N": 128, "K": 512}, True, "*bf16", (Case("3 heads", {"B": 3, "M": 5, "N": 128, "K": 256}),),
)  # fmt: skip
BF16_HEADS_KN = bf16(
    "bf16_heads_kn", ("linear.heads",), "One product per head, weights [K, N]: absorbed key projection",
    {"B": 128, "M": 64, "N": 512, "K": 128}, False, "*bf16", (Case("3 heads", {"B": 3, "M": 5, "N": 256, "K": 128}),),
)  # fmt: skip

SPECS = (FP8_GEMM, FP8_GEMM_TMA, FP8_GEMM_TMA_WS, BF16_GEMM, BF16_GEMM_F32, BF16_HEADS_NK, BF16_HEADS_KN)
