"""Declarations of the row-wise kernels: norms, quantisation, SwiGLU, embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.recipe import (
    BF16_ROUNDING,
    EVERYWHERE,
    FP8,
    power_of_two,
    quantise_1x128,
    rounded_to_fp8,
)

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

WITH_FP8 = (*FP8, "gfx942")


def rounding(p: Problem, argument: str) -> float:
    return BF16_ROUNDING * 1.001 if p.instance.signature[argument] == "*bf16" else 0.0


def hard_rows(p: Problem, *shape: int) -> Tensor:
    """Random rows; among them one of zeros, one with an outlier, one of float32 subnormals, one of tiny numbers."""
    x = p.normal(*shape)
    if shape[0] > 4:
        x[1] = 0.0
        x[2, 7] = 3e4
        x[3] = 1e-39
        x[4] *= 1e-6
    return x


def build_norm(p: Problem) -> dict[str, Any]:
    x = {"x_ptr": p.put("x_ptr", hard_rows(p, p.T, p.D)), "weight_ptr": p.put("weight_ptr", 1 + 0.1 * p.normal(p.D))}
    if p.RESIDUAL:
        x["residual_ptr"] = p.put("residual_ptr", p.normal(p.T, p.D))
    if p.KEEP:
        x["y_ptr"] = p.output("y_ptr", p.T, p.D)
    if p.QUANTISE:
        x["q_ptr"] = p.output("q_ptr", p.T, p.D)
        x["scale_ptr"] = p.output("scale_ptr", p.T, -(-p.D // 128))
    return {**x, "eps": 1e-6}


def reference_norm(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    total = x["x_ptr"].float()
    out = {}
    if p.RESIDUAL:
        total = (total + x["residual_ptr"].float()).to(x["residual_ptr"].dtype)
        out["residual_ptr"] = Expected(total)
    y = total.double()
    y = y / (y.square().mean(-1, keepdim=True) + x["eps"]).sqrt() * x["weight_ptr"].double()
    if p.KEEP:
        out["y_ptr"] = Expected(y, max(rounding(p, "y_ptr"), 2e-6), 1e-7)
    if p.QUANTISE:
        out |= rounded_to_fp8(y, "q_ptr", "scale_ptr", pow2=bool(p.POW2))
    return out


NORM_TYPES = {"x_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*bf16", "y_ptr": "*bf16",
              "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}  # fmt: skip


def norm(name: str, ops: tuple[str, ...], summary: str, residual: bool, keep: bool, quantise: bool) -> KernelSpec:
    optional = {"residual_ptr": residual, "y_ptr": keep, "q_ptr": quantise, "scale_ptr": quantise}

    def constants(dims: Dims) -> dict[str, Constant]:
        absent: dict[str, Constant] = {n: None for n, here in optional.items() if not here}
        groups = power_of_two(-(-dims["D"] // 128))
        flags = {"RESIDUAL": residual, "KEEP": keep, "QUANTISE": quantise, "POW2": False}
        return {**absent, "D": dims["D"], "GROUPS": groups, **flags}

    moved = 2 + (4 if residual else 0) + (2 if keep else 0) + (1 if quantise else 0)
    return KernelSpec(
        name=name,
        function="rows:rms_norm",
        ops=ops,
        summary=summary,
        signature={**{n: t for n, t in NORM_TYPES.items() if optional.get(n, True)}, "eps": "fp32"},
        dims={"T": 128, "D": 7168},
        constants=constants,
        tiles=on(WITH_FP8 if quantise else EVERYWHERE, any=Tile({}, 8, 1)),
        grid=("T",),
        build=build_norm,
        reference=reference_norm,
        cases=(
            Case("6 tokens of 7168", {"T": 6}),
            Case("one token of 512", {"T": 1, "D": 512}),
            Case("ragged last group, float32", {"T": 5, "D": 336}, {"x_ptr": "*fp32", "weight_ptr": "*fp32"}),
        ),
        flops="5*T*D",
        bytes=f"T*D*{moved} + 2*D" + (" + 4*T*ceildiv(D, 128)" if quantise else ""),
        fallback="rms_norm_residual" if residual else "rms_norm" if quantise else "",
    )


def build_quantise(p: Problem) -> dict[str, Any]:
    return {
        "x_ptr": p.put("x_ptr", hard_rows(p, p.M, p.K)), "q_ptr": p.output("q_ptr", p.M, p.K),
        "scale_ptr": p.output("scale_ptr", p.M, -(-p.K // 128)), "K": p.K,
    }  # fmt: skip


def reference_quantise(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    value = x["x_ptr"].double()
    as_bytes = p.instance.signature["scale_ptr"] == "*u8"
    out = rounded_to_fp8(value, "q_ptr", "scale_ptr", pow2=bool(p.POW2), slack=0.0, gpu_slack=0.0, as_bytes=as_bytes)
    # The cast has nothing to round differently: the bytes are torch's own.
    return {**out, "q_ptr": Expected(quantise_1x128(value.float(), bool(p.POW2))[0].double())}


def quantiser(name: str, scale: str, pow2: bool, summary: str) -> KernelSpec:
    def constants(dims: Dims) -> dict[str, Constant]:
        return {"POW2": pow2}

    return KernelSpec(
        name=name,
        function="rows:quantise",
        ops=("quant.cast",),
        summary=summary,
        signature={"x_ptr": "*bf16", "q_ptr": "*fp8e4nv", "scale_ptr": scale, "K": "i32"},
        dims={"M": 128, "K": 7168},
        constants=constants,
        tiles=on(WITH_FP8, any=Tile({"GROUPS": 16}, 4, 1)),
        grid=("M", "ceildiv(ceildiv(K, 128), GROUPS)"),
        build=build_quantise,
        reference=reference_quantise,
        cases=(
            Case("zeros, an outlier, subnormals", {"M": 8, "K": 7168}),
            Case("float32, ragged last group", {"M": 6, "K": 208}, {"x_ptr": "*fp32"}),
            Case("one token", {"M": 1, "K": 128}),
        ),
        flops="3*M*K",
        bytes="3*M*K + " + ("1" if scale == "*u8" else "4") + "*M*ceildiv(K, 128)",
        aligned=("K",),
        requires=("K % 16 == 0",),
    )


def build_swiglu(p: Problem) -> dict[str, Any]:
    out = {"x_ptr": p.put("x_ptr", p.normal(p.M, 2 * p.INNER)), "y_ptr": p.output("y_ptr", p.M, p.INNER)}
    if p.QUANTISE:
        out["scale_ptr"] = p.output("scale_ptr", p.M, -(-p.INNER // 128))
    return {**out, "INNER": p.INNER}


def reference_swiglu(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    import torch

    gate, up = x["x_ptr"].double().chunk(2, -1)
    y = torch.nn.functional.silu(gate) * up
    if p.QUANTISE:
        return rounded_to_fp8(y, "y_ptr", "scale_ptr", pow2=bool(p.POW2))
    return {"y_ptr": Expected(y, max(rounding(p, "y_ptr"), 2e-6), 1e-7)}


def swiglu(name: str, quantise: bool, summary: str) -> KernelSpec:
    def constants(dims: Dims) -> dict[str, Constant]:
        return {"QUANTISE": quantise, "POW2": False, **({} if quantise else {"scale_ptr": None})}

    return KernelSpec(
        name=name,
        function="rows:swiglu",
        ops=("swiglu", "quant.cast") if quantise else ("swiglu",),
        summary=summary,
        signature={
            "x_ptr": "*bf16", "y_ptr": "*fp8e4nv" if quantise else "*bf16",
            **({"scale_ptr": "*fp32"} if quantise else {}), "INNER": "i32",
        },
        dims={"M": 128, "INNER": 2048},
        constants=constants,
        tiles=on(WITH_FP8 if quantise else EVERYWHERE, any=Tile({"GROUPS": 16}, 4, 1)),
        grid=("M", "ceildiv(ceildiv(INNER, 128), GROUPS)"),
        build=build_swiglu,
        reference=reference_swiglu,
        cases=(
            Case("7 rows", {"M": 7, "INNER": 2048}),
            Case("one row, ragged last group", {"M": 1, "INNER": 176}),
        ),
        flops="5*M*INNER",
        bytes="5*M*INNER + 4*M*ceildiv(INNER, 128)" if quantise else "6*M*INNER",
        aligned=("INNER",),
        requires=("INNER % 16 == 0",),
        fallback="swiglu" if quantise else "",
    )  # fmt: skip


def build_embedding(p: Problem) -> dict[str, Any]:
    return {
        "ids_ptr": p.integers(0, p.V, p.T), "table_ptr": p.put("table_ptr", p.normal(p.V, p.D)),
        "y_ptr": p.output("y_ptr", p.T, p.D), "D": p.D,
    }  # fmt: skip


def reference_embedding(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    return {"y_ptr": Expected(x["table_ptr"][x["ids_ptr"].long()])}


def no_constants(dims: Dims) -> dict[str, Constant]:
    return {}


EMBEDDING = KernelSpec(
    name="embedding",
    function="rows:embedding",
    ops=("embed", "rows.gather"),
    summary="Rows of a table: the embedding, or the rows whose logits are wanted",
    signature={"ids_ptr": "*i32", "table_ptr": "*bf16", "y_ptr": "*bf16", "D": "i32"},
    dims={"T": 128, "D": 7168, "V": 129280},
    constants=no_constants,
    tiles=on(EVERYWHERE, any=Tile({"BLOCK": 1024}, 4, 1)),
    grid=("T", "ceildiv(D, BLOCK)"),
    build=build_embedding,
    reference=reference_embedding,
    cases=(Case("9 tokens", {"T": 9, "D": 1200, "V": 50}), Case("one token", {"T": 1, "D": 64, "V": 3})),
    flops="0",
    bytes="T*(4*D + 4)",
    aligned=("D",),
    requires=("D % 16 == 0",),
)


def build_add(p: Problem) -> dict[str, Any]:
    a, b = (p.put(n, p.normal(p.N)) for n in ("a_ptr", "b_ptr"))
    return {"a_ptr": a, "b_ptr": b, "y_ptr": p.output("y_ptr", p.N), "N": p.N}


def reference_add(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    return {"y_ptr": Expected(x["a_ptr"] + x["b_ptr"])}


ADD = KernelSpec(
    name="add",
    function="rows:add",
    ops=("add",),
    summary="Elementwise sum",
    signature={"a_ptr": "*bf16", "b_ptr": "*bf16", "y_ptr": "*bf16", "N": "i64"},
    dims={"N": 128 * 7168},
    constants=no_constants,
    tiles=on(EVERYWHERE, any=Tile({"BLOCK": 2048}, 8, 1)),
    grid=("ceildiv(N, BLOCK)",),
    build=build_add,
    reference=reference_add,
    cases=(Case("5000 elements", {"N": 5000}), Case("one element", {"N": 1})),
    flops="N",
    bytes="6*N",
)

SPECS = (
    norm("rms_norm", ("norm.rms",), "RMSNorm", False, True, False),
    norm("rms_norm_residual", ("norm.add_rms",), "Residual sum and RMSNorm", True, True, False),
    norm("rms_norm_quant", ("norm.rms", "quant.cast"), "RMSNorm and 1x128 quantisation", False, False, True),
    norm(
        "rms_norm_residual_quant", ("norm.add_rms", "quant.cast"),
        "Residual sum, RMSNorm, its BF16 result and its 1x128 quantisation", True, True, True,
    ),
    quantiser("quantise", "*fp32", False, "1x128 quantisation, float32 scales"),
    quantiser("quantise_ue8m0", "*u8", True, "1x128 quantisation, power-of-two scales stored as exponent bytes"),
    quantiser("quantise_pow2", "*fp32", True, "1x128 quantisation, power-of-two scales stored as float32"),
    swiglu("swiglu_quant", True, "SwiGLU and 1x128 quantisation"),
    swiglu("swiglu", False, "SwiGLU in BF16"),
    EMBEDDING,
    ADD,
)  # fmt: skip
