"""Declarations of the grouped matrix products of the routed experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, TileTable, on
from moec.codegen.triton.specs.gemm import product_bound
from moec.codegen.triton.specs.recipe import (
    FP8,
    quantise_1x128,
    quantise_128x128,
    rounded_to_fp8,
    wide,
    wide_blocks,
)

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

# How many tokens an expert gets: what the test cases vary, by index.
LOADS = (
    (3, 0, 70, 64),
    (0, 0, 97, 0),
    (1, 0, 0, 0),
    (0, 0, 0, 0),
)
CASES = (
    Case("ragged, one expert empty", {"LOAD": 0}),
    Case("all tokens to one expert", {"LOAD": 1}),
    Case("one token", {"LOAD": 2}),
    Case("no token", {"LOAD": 3}),
    Case("last block of K half full", {"LOAD": 0, "K": 192}),
)
SMALL = {"E": 4, "N": 256, "INNER": 256, "K": 384}


def small(cases: tuple[Case, ...], masked: bool) -> tuple[Case, ...]:
    """The cases at test size; `R` rows hold every load in the layout, blocks of up to 128 rows."""
    rows = {"CAPACITY": 100, "R": 400} if masked else {"R": 512}
    return tuple(Case(c.name, {**SMALL, **rows, **c.dims}) for c in cases)


def form(masked: bool) -> str:
    return "masked" if masked else "contiguous"


def loads_of(p: Problem) -> tuple[int, ...]:
    """Tokens of every expert: those of the case, or as many as the layout holds."""
    return LOADS[p.LOAD] if p.LOAD >= 0 else ((p.CAPACITY if p.ALIGN == 0 else p.R // p.E),) * p.E


def layout(p: Problem) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """The layout argument, and (expert, first row, last row + 1) of every expert's rows."""
    import torch

    loads = loads_of(p)
    if p.ALIGN == 0:
        spans = [(e, e * p.CAPACITY, e * p.CAPACITY + n) for e, n in enumerate(loads)]
        return torch.tensor(loads, dtype=torch.int32), spans
    blocks = torch.full((p.R // p.ALIGN,), -1, dtype=torch.int32)
    spans, row = [], 0
    for e, n in enumerate(loads):
        end = row + -(-n // p.ALIGN) * p.ALIGN
        blocks[row // p.ALIGN : end // p.ALIGN] = e
        spans.append((e, row, row + n))
        row = end
    return blocks, spans


def used(p: Problem, spans: list[tuple[int, int, int]]) -> Tensor:
    """Which rows the kernel writes, [R, 1]: padding belongs to its block in the contiguous layout."""
    import torch

    rows = torch.zeros(p.R, 1, dtype=torch.bool)
    for _, first, end in spans:
        rows[first : end if p.ALIGN == 0 else first + -(-(end - first) // p.ALIGN) * p.ALIGN] = True
    return rows


def products(p: Problem, a: Tensor, b: Tensor, spans: list[tuple[int, int, int]]) -> Tensor:
    """Float64 [R, rows of b] of every expert's rows; the padding that a block covers is multiplied too."""
    import torch

    out = torch.zeros(p.R, b.shape[1], dtype=torch.float64)
    for e, first, end in spans:
        stop = end if p.ALIGN == 0 else first + -(-(end - first) // p.ALIGN) * p.ALIGN
        out[first:stop] = a[first:stop] @ b[e].T
    return out


def build_fp8(p: Problem) -> dict[str, Any]:
    fused = "c_scale_ptr" in p.instance.signature
    columns = 2 * p.INNER if fused else p.N
    a, a_scale = quantise_1x128(p.normal(p.R, p.K))
    b, b_scale = quantise_128x128(p.normal(p.E, columns, p.K, scale=p.K**-0.5))
    out = {"c_ptr": p.output("c_ptr", p.R, p.INNER if fused else p.N)}
    if fused:
        out["c_scale_ptr"] = p.output("c_scale_ptr", p.R, p.INNER // 128)
    sizes = {"INNER": p.INNER} if fused else {"N": p.N}
    return {
        "a_ptr": a, "a_scale_ptr": a_scale, "b_ptr": b, "b_scale_ptr": b_scale, **out, "layout_ptr": layout(p)[0],
        **sizes, "K": p.K, "capacity": 0 if p.ALIGN else p.CAPACITY,
    }  # fmt: skip


def reference_fp8(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    spans = layout(p)[1]
    value = products(p, wide(x["a_ptr"], x["a_scale_ptr"]), wide_blocks(x["b_ptr"], x["b_scale_ptr"]), spans)
    return {"c_ptr": Expected(value, *product_bound(p), where=used(p, spans))}


def gated(value: Tensor) -> Tensor:
    import torch

    gate, up = value.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def reference_fp8_swiglu(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    spans = layout(p)[1]
    value = products(p, wide(x["a_ptr"], x["a_scale_ptr"]), wide_blocks(x["b_ptr"], x["b_scale_ptr"]), spans)
    return rounded_to_fp8(gated(value), "c_ptr", "c_scale_ptr", pow2=bool(p.POW2), gpu_slack=1e-2, where=used(p, spans))


def build_bf16(p: Problem) -> dict[str, Any]:
    fused = "INNER" in p.instance.signature
    columns = 2 * p.INNER if fused else p.N
    sizes = {"INNER": p.INNER} if fused else {"N": p.N}
    return {
        "a_ptr": p.put("a_ptr", p.normal(p.R, p.K)),
        "b_ptr": p.put("b_ptr", p.normal(p.E, columns, p.K, scale=p.K**-0.5)),
        "c_ptr": p.output("c_ptr", p.R, p.INNER if fused else p.N), "layout_ptr": layout(p)[0],
        **sizes, "K": p.K, "capacity": 0 if p.ALIGN else p.CAPACITY,
    }  # fmt: skip


def reference_bf16(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    spans = layout(p)[1]
    value = products(p, x["a_ptr"].double(), x["b_ptr"].double(), spans)
    rounding, absolute, _ = product_bound(p)
    fused = "INNER" in p.instance.signature
    return {"c_ptr": Expected(gated(value) if fused else value, rounding, absolute, 1e-4, where=used(p, spans))}


def grouped(
    name: str, function: str, summary: str, masked: bool, signature: dict[str, str], tiles: TileTable,
    build: Any, reference: Any, **facts: Any,
) -> KernelSpec:  # fmt: skip
    """A grouped product in one layout. `facts`: grid column, flops, bytes and what else the spec takes."""
    columns: str = facts.pop("columns")
    constants_for: dict[str, Constant] = facts.pop("fixed", {})
    step: int = facts.pop("step")

    def constants(dims: Dims) -> dict[str, Constant]:
        return {"EVEN_K": dims["K"] % step == 0, "ALIGN": dims["ALIGN"], **constants_for}

    rows = ("ceildiv(CAPACITY, BM)", "E") if masked else ("R // BM",)
    return KernelSpec(
        name=f"{name}_{form(masked)}",
        function=f"grouped:{function}",
        ops=("moe.experts",),
        summary=f"{summary}; {form(masked)} layout",
        signature=signature,
        dims={
            "E": 4,
            "N": 7168,
            "INNER": 2048,
            "K": 7168,
            "CAPACITY": 256,
            "R": 1024,
            "LOAD": -1,
            "ALIGN": 0 if masked else 128,
            **facts.pop("dims", {}),
        },
        shape_dims={} if masked else {"prefill": {"R": 32768}},
        constants=constants,
        tiles=tiles,
        grid=(columns, *rows),
        build=build,
        reference=reference,
        cases=small(CASES, masked),
        requires=("K % 16 == 0", "INNER % 128 == 0", "N % 16 == 0", "ALIGN % BM == 0"),
        tensor_core=True,
        **facts,
    )


POINTERS = {"a_ptr": "*fp8e4nv", "a_scale_ptr": "*fp32", "b_ptr": "*fp8e4nv", "b_scale_ptr": "*fp32"}
LAYOUT = {"layout_ptr": "*i32"}
SIZES = {"N": "i32", "K": "i32", "capacity": "i32"}
INNER_SIZES = {"INNER": "i32", "K": "i32", "capacity": "i32"}
FEW = {"BM": 64, "BN": 128}
MANY = {"BM": 128, "BN": 128}
NARROW = {"BM": 64, "BN": 64, "BK": 64}


def fp8_tiles(masked: bool) -> TileTable:
    if masked:
        return on(FP8, any=Tile(FEW, 4, 4)) | on(("gfx942",), any=Tile(FEW, 4, 2))
    return on(FP8, decode=Tile(FEW, 4, 4), prefill=Tile(MANY, 8, 4)) | on(
        ("gfx942",), decode=Tile(FEW, 4, 2), prefill=Tile(MANY, 8, 2)
    )


SPECS = tuple(
    spec
    for masked in (False, True)
    for spec in (
        grouped(
            "grouped_fp8_swiglu", "grouped_fp8_swiglu",
            "Experts' gate and up projection, SwiGLU and 1x128 quantisation", masked,
            {**POINTERS, "c_ptr": "*fp8e4nv", "c_scale_ptr": "*fp32", **LAYOUT, **INNER_SIZES},
            on(FP8, any=Tile({"BM": 64}, 8, 3)) | on(("gfx942",), any=Tile({"BM": 64}, 8, 2)),
            build_fp8, reference_fp8_swiglu, columns="INNER // 128", step=128, fixed={"POW2": False},
            flops="4*R*INNER*K", aligned=("INNER", "K"), fallback=f"grouped_bf16_swiglu_{form(masked)}",
            bytes="R*K + 4*R*ceildiv(K, 128) + 2*E*INNER*K + R*INNER + 4*R*(INNER // 128)",
        ),
        grouped(
            "grouped_fp8_gemm", "grouped_fp8_gemm", "Experts' down projection in FP8", masked,
            {**POINTERS, "c_ptr": "*bf16", **LAYOUT, **SIZES}, fp8_tiles(masked),
            build_fp8, reference_fp8, columns="ceildiv(N, BN)", step=128, dims={"K": 2048},
            flops="2*R*N*K", aligned=("N", "K"), fallback=f"grouped_bf16_gemm_{form(masked)}",
            bytes="R*K + 4*R*ceildiv(K, 128) + E*N*K + 2*R*N",
        ),
        grouped(
            "grouped_bf16_swiglu", "grouped_bf16_swiglu", "Experts' gate and up projection with SwiGLU in BF16", masked,
            {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*bf16", **LAYOUT, **INNER_SIZES},
            on(("sm_80", "sm_90a", "sm_100a"), any=Tile(NARROW, 4, 3)) | on(("gfx942",), any=Tile(NARROW, 4, 1)),
            build_bf16, reference_bf16, columns="ceildiv(INNER, BN)", step=64,
            flops="4*R*INNER*K", aligned=("INNER", "K"), bytes="2*(R*K + 2*E*INNER*K + R*INNER)",
        ),
        grouped(
            "grouped_bf16_gemm", "grouped_bf16_gemm", "Experts' down projection in BF16", masked,
            {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*bf16", **LAYOUT, **SIZES},
            on(("sm_80", "sm_90a", "sm_100a"), any=Tile(NARROW, 4, 4)) | on(("gfx942",), any=Tile(NARROW, 4, 2)),
            build_bf16, reference_bf16, columns="ceildiv(N, BN)", step=64, dims={"K": 2048},
            flops="2*R*N*K", aligned=("N", "K"), bytes="2*(R*K + E*N*K + R*N)",
        ),
    )
)  # fmt: skip
