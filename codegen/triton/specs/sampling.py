"""Declarations of the choice of the next token."""

from __future__ import annotations

from typing import Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.recipe import EVERYWHERE


def no_constants(dims: Dims) -> dict[str, Constant]:
    return {}


def build_greedy(p: Problem) -> dict[str, Any]:
    logits = p.normal(p.T, p.V)
    # Equal maxima, and a row whose only finite logit is the last.
    logits[0, p.V // 3] = logits[0, p.V // 2] = 50.0
    if p.T > 1:
        logits[1, :-1] = float("-inf")
    return {"logit_ptr": p.put("logit_ptr", logits), "token_ptr": p.output("token_ptr", p.T), "V": p.V}


def reference_greedy(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    import torch

    top = x["logit_ptr"].amax(-1, keepdim=True)
    column = torch.arange(p.V).expand(p.T, -1)
    return {"token_ptr": Expected(column.masked_fill(x["logit_ptr"] < top, p.V).amin(-1))}


GREEDY = KernelSpec(
    name="greedy",
    function="sampling:greedy",
    ops=("sample.greedy",),
    summary="Index of the largest logit",
    signature={"logit_ptr": "*fp32", "token_ptr": "*i32", "V": "i32"},
    dims={"T": 128, "V": 129280},
    constants=no_constants,
    tiles=on(EVERYWHERE, any=Tile({"BLOCK": 4096}, 8, 2)),
    grid=("T",),
    build=build_greedy,
    reference=reference_greedy,
    cases=(Case("3 rows of 9000", {"T": 3, "V": 9000}), Case("one row of 100", {"T": 1, "V": 100})),
    flops="T*V",
    bytes="4*T*V + 4*T",
)


def build_top_p(p: Problem) -> dict[str, Any]:
    import torch

    rows = torch.arange(p.T)
    return {
        "logit_ptr": p.put("logit_ptr", p.normal(p.T, p.V, scale=2.0)), "temperature_ptr": 0.5 + p.uniform(p.T),
        "top_p_ptr": torch.tensor([0.9, 1.0, 1e-3, 0.5])[rows % 4], "uniform_ptr": p.uniform(p.T),
        "token_ptr": p.output("token_ptr", p.T), "V": p.V,
    }  # fmt: skip


def reference_top_p(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    """By sorting, in float64; a row whose draw falls within rounding of a token's edge is not compared."""
    import torch

    probability = (x["logit_ptr"].double() / x["temperature_ptr"].double()[:, None]).softmax(-1)
    order = probability.sort(-1, descending=True)
    before = order.values.cumsum(-1) - order.values
    kept = torch.zeros_like(probability, dtype=torch.bool)
    kept.scatter_(1, order.indices, before < x["top_p_ptr"].double()[:, None])
    mass = (probability * kept).cumsum(-1)
    target = mass[:, -1:] * x["uniform_ptr"].double()[:, None]
    token = (mass <= target).sum(-1)
    clear = ((mass - target).abs().amin(-1) > 1e-5) & ((before - x["top_p_ptr"][:, None]).abs().amin(-1) > 1e-6)

    def decided(written: dict[str, Any]) -> torch.Tensor:
        return torch.where(clear, written["token_ptr"].double(), token.double())

    return {"token_ptr": Expected(token, read=decided)}


TOP_P = KernelSpec(
    name="top_p",
    function="sampling:top_p",
    ops=("sample.top_p",),
    summary="A draw from the smallest set of tokens that holds mass top_p",
    signature={
        "logit_ptr": "*fp32", "temperature_ptr": "*fp32", "top_p_ptr": "*fp32", "uniform_ptr": "*fp32",
        "token_ptr": "*i32", "V": "i32",
    },
    dims={"T": 128, "V": 129280},
    constants=no_constants,
    tiles=on(EVERYWHERE, any=Tile({"BLOCK": 4096}, 8, 2)),
    grid=("T",),
    build=build_top_p,
    reference=reference_top_p,
    cases=(Case("4 rows of 5000", {"T": 4, "V": 5000}), Case("one row of 60", {"T": 1, "V": 60})),
    flops="T*V*35",
    bytes="4*T*V + 16*T",
)  # fmt: skip

SPECS = (GREEDY, TOP_P)
