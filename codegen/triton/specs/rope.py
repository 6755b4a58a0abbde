"""Declarations of the rotary embedding and the cache write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.attention import cache_row, fp8_cache
from moec.codegen.triton.specs.recipe import EVERYWHERE, FP8, rounded_to_fp8
from moec.codegen.triton.specs.rows import rounding

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

POSITIONS = 512


def angles(p: Problem) -> tuple[Tensor, Tensor]:
    """cos and sin [POSITIONS, DR/2] of base 10000."""
    import torch

    frequency = 10000.0 ** -(torch.arange(0, p.DR, 2).double() / p.DR)
    angle = torch.arange(POSITIONS).double()[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotated(p: Problem, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Float64 x[..., DR] rotated as complex numbers; pairs are neighbours or halves, as the kernel has them."""
    import torch

    if p.INTERLEAVED:
        pairs = x.double().reshape(*x.shape[:-1], -1, 2)
    else:
        pairs = x.double().reshape(*x.shape[:-1], 2, -1).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.double(), sin.double())
    out = torch.view_as_real(turned)
    return out.flatten(-2) if p.INTERLEAVED else out.transpose(-1, -2).flatten(-2)


def build_rope(p: Problem) -> dict[str, Any]:
    """Queries [T, H, DN+DR], rotated into their place in [T, H, DV+DR], the layout of absorbed attention."""
    cos, sin = angles(p)
    x = p.put("x_ptr", p.normal(p.T, p.H, p.DN + p.DR))
    y = p.output("y_ptr", p.T, p.H, p.DV + p.DR)
    return {
        "x_ptr": x[..., p.DN :], "y_ptr": y[..., p.DV :], "cos_ptr": cos, "sin_ptr": sin,
        "position_ptr": p.integers(0, POSITIONS, p.T), "x_token": p.H * (p.DN + p.DR), "x_head": p.DN + p.DR,
        "y_token": p.H * (p.DV + p.DR), "y_head": p.DV + p.DR, "H": p.H,
    }  # fmt: skip


def reference_rope(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    at = x["position_ptr"].long()
    value = rotated(p, x["x_ptr"], x["cos_ptr"][at][:, None], x["sin_ptr"][at][:, None])
    return {"y_ptr": Expected(value, rounding(p, "y_ptr"), 1e-6)}


def rope(interleaved: bool) -> KernelSpec:
    def constants(dims: Dims) -> dict[str, Constant]:
        return {"DR": dims["DR"], "INTERLEAVED": interleaved}

    distances = ("x_token", "x_head", "y_token", "y_head")
    return KernelSpec(
        name="rope_interleaved" if interleaved else "rope_halves",
        function="rope:rope",
        ops=("rope",),
        summary=f"Rotary embedding of every head, pairs are {'neighbours' if interleaved else 'halves'}",
        signature={
            "x_ptr": "*bf16", "y_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "position_ptr": "*i32",
            **dict.fromkeys(distances, "i64"), "H": "i32",
        },
        dims={"T": 128, "H": 128, "DR": 64, "DN": 128, "DV": 512},
        constants=constants,
        tiles=on(EVERYWHERE, any=Tile({"BH": 32}, 4, 1)),
        grid=("T", "ceildiv(H, BH)"),
        build=build_rope,
        reference=reference_rope,
        cases=(
            Case("5 tokens, 40 heads", {"T": 5, "H": 40}),
            Case("one token in float32", {"T": 1, "H": 3}, {"x_ptr": "*fp32", "y_ptr": "*fp32"}),
        ),
        flops="3*T*H*DR",
        bytes="4*T*H*DR",
        aligned=distances,
    )  # fmt: skip


def build_append(p: Problem) -> dict[str, Any]:
    import torch

    cos, sin = angles(p)
    rows = max(2 * p.T, 64)
    slot = p.shuffled(rows)[: p.T].to(torch.int32)
    if p.T > 2:
        slot[1] = -1
    if p.SCALE_ROW:
        latent, scale, rope_part = fp8_cache(rows, p.DV, p.DR)
        cache = {"latent_ptr": latent, "rope_ptr": rope_part, "scale_ptr": scale}
    else:
        whole = p.output("latent_ptr", rows, p.DV + p.DR)
        cache = {"latent_ptr": whole[:, : p.DV], "rope_ptr": whole[:, p.DV :]}
    return {
        "x_ptr": p.put("x_ptr", p.normal(p.T, p.DV + p.DR)),
        "weight_ptr": p.put("weight_ptr", 1 + 0.1 * p.normal(p.DV)), "cos_ptr": cos, "sin_ptr": sin,
        "position_ptr": p.integers(0, POSITIONS, p.T), "slot_ptr": slot, **cache, "x_token": p.DV + p.DR, "eps": 1e-6,
    }  # fmt: skip


def reference_append(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    import torch

    rows = len(x["latent_ptr"])
    slot = x["slot_ptr"].long()
    live = slot >= 0
    written = torch.zeros(rows, 1, dtype=torch.bool)
    written[slot[live]] = True
    latent = x["x_ptr"][:, : p.DV].double()
    latent = latent / (latent.square().mean(-1, keepdim=True) + x["eps"]).sqrt() * x["weight_ptr"].double()
    at = x["position_ptr"].long()
    key = rotated(p, x["x_ptr"][:, p.DV :], x["cos_ptr"][at], x["sin_ptr"][at])
    latents = torch.zeros(rows, p.DV, dtype=torch.float64).index_copy_(0, slot[live], latent[live])
    keys = torch.zeros(rows, p.DR, dtype=torch.float64).index_copy_(0, slot[live], key[live])
    out = {"rope_ptr": Expected(keys, rounding(p, "rope_ptr"), 1e-6, where=written)}
    if p.SCALE_ROW:
        return out | rounded_to_fp8(latents, "latent_ptr", "scale_ptr", pow2=bool(p.POW2), where=written)
    return out | {"latent_ptr": Expected(latents, rounding(p, "latent_ptr"), 1e-6, where=written)}


def append(fp8: bool) -> KernelSpec:
    def constants(dims: Dims) -> dict[str, Constant]:
        rows = cache_row(dims["DV"], dims["DR"], fp8)
        absent: dict[str, Constant] = {} if fp8 else {"scale_ptr": None}
        return {**absent, "DV": dims["DV"], "DR": dims["DR"], **rows, "INTERLEAVED": True, "POW2": False}

    cache = {
        "latent_ptr": "*fp8e4nv" if fp8 else "*bf16",
        "rope_ptr": "*bf16",
        **({"scale_ptr": "*fp32"} if fp8 else {}),
    }
    return KernelSpec(
        name="latent_append_fp8" if fp8 else "latent_append",
        function="rope:latent_append",
        ops=("cache.append", "norm.rms", "rope", "quant.cast") if fp8 else ("cache.append", "norm.rms", "rope"),
        summary=f"Latent norm, rotation of the shared key and write into the {'FP8' if fp8 else 'BF16'} cache",
        signature={
            "x_ptr": "*bf16", "weight_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "position_ptr": "*i32",
            "slot_ptr": "*i32", **cache, "x_token": "i64", "eps": "fp32",
        },
        dims={"T": 128, "DV": 512, "DR": 64},
        constants=constants,
        tiles=on((*FP8, "gfx942") if fp8 else EVERYWHERE, any=Tile({}, 2, 1)),
        grid=("T",),
        build=build_append,
        reference=reference_append,
        cases=(Case("9 tokens, one of them padding", {"T": 9}), Case("one token", {"T": 1})),
        flops="T*(5*DV + 3*DR)",
        bytes="T*(2*(DV + DR) + " + ("DV + 4*(DV // 128) + 2*DR" if fp8 else "2*(DV + DR)") + ") + 2*DV",
        aligned=("x_token",),
        requires=("DV % 128 == 0",),
        fallback="latent_append" if fp8 else "",
    )  # fmt: skip


SPECS = (rope(True), rope(False), append(False), append(True))
