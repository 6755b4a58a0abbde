"""Declarations of the routers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.recipe import EVERYWHERE, power_of_two

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor


FLAT = Case("zeros, subnormals and equal scores", {"T": 6, "FLAT": 1})


def flatten(logits: Tensor) -> None:
    """Rows of zeros, of subnormal numbers and of few different ones: many equal scores."""
    logits[0] = 0.0
    logits[1] *= 1e-40
    logits[2:] = logits[2:].round()


def build_route(p: Problem) -> dict[str, Any]:
    import torch

    logits = p.normal(p.T, p.E)
    if p.instance.dims.get("ONE_EXPERT"):
        logits[:, 5] += 40.0
    if p.instance.dims.get("FLAT"):
        flatten(logits)
    x = {"logit_ptr": p.put("logit_ptr", logits)}
    if p.BIAS:
        bias = p.normal(p.E, scale=0.1)
        if p.instance.dims.get("ONE_EXPERT"):
            bias[5] = 1.0
        x["bias_ptr"] = p.put("bias_ptr", bias)
    return {
        **x, "index_ptr": p.output("index_ptr", p.T, p.TOP_K), "weight_ptr": p.output("weight_ptr", p.T, p.TOP_K),
        "count_ptr": torch.zeros(p.E, dtype=torch.int32), "T": p.T, "route_scale": 2.5,
    }  # fmt: skip


def reference_route(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    """Group-limited top-k by sorting, in float64; of equal scores the first."""
    import torch

    def best(x: Tensor, k: int) -> Tensor:
        return torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k]

    logits = x["logit_ptr"].double()
    score = logits.softmax(-1) if p.SOFTMAX else logits.sigmoid()
    choice = score + x["bias_ptr"].double() if p.BIAS else score
    if p.TOP_GROUPS < p.NG:
        groups = choice.view(p.T, p.NG, -1)
        group_score = groups.topk(2, -1).values.sum(-1) if p.PAIR_SCORE else groups.amax(-1)
        kept = torch.zeros(p.T, p.NG, dtype=torch.bool).scatter_(1, best(group_score, p.TOP_GROUPS), True)
        choice = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    index = best(choice, p.TOP_K)
    weight = score.gather(1, index)
    if p.NORMALISE:
        weight = weight / weight.sum(-1, keepdim=True)
    return {
        "index_ptr": Expected(index),
        "weight_ptr": Expected(weight * x["route_scale"], 2e-6, 1e-7, 1e-5),
        "count_ptr": Expected(torch.bincount(index.flatten(), minlength=p.E)),
    }


def route(
    name: str, summary: str, dims: Dims, bias: bool, softmax: bool, normalise: bool, cases: tuple[Case, ...],
    pairs: bool | None = None,
) -> KernelSpec:  # fmt: skip
    def constants(d: Dims) -> dict[str, Constant]:
        absent: dict[str, Constant] = {} if bias else {"bias_ptr": None}
        return {
            **absent, "E": d["E"], "NG": d["NG"], "NG2": power_of_two(d["NG"]), "GS2": power_of_two(d["E"] // d["NG"]),
            "TOP_GROUPS": d["TOP_GROUPS"], "TOP_K": d["TOP_K"], "TOP_K2": power_of_two(d["TOP_K"]),
            "SOFTMAX": softmax, "BIAS": bias, "PAIR_SCORE": bias if pairs is None else pairs, "NORMALISE": normalise,
        }  # fmt: skip

    return KernelSpec(
        name=name,
        function="routing:route",
        ops=("moe.route",),
        summary=summary,
        signature={
            "logit_ptr": "*fp32", **({"bias_ptr": "*fp32"} if bias else {}), "index_ptr": "*i32", "weight_ptr": "*fp32",
            "count_ptr": "*i32", "T": "i32", "route_scale": "fp32",
        },
        dims=dims,
        constants=constants,
        tiles=on(EVERYWHERE, any=Tile({"BT": 4}, 4, 1)),
        grid=("ceildiv(T, BT)",),
        build=build_route,
        reference=reference_route,
        cases=cases,
        flops="T*E*(TOP_K + TOP_GROUPS + 8)",
        bytes="T*(4*E + 8*TOP_K) + 8*E",
        requires=("E % NG == 0", "TOP_GROUPS <= NG", "TOP_K <= TOP_GROUPS * (E // NG)"),
    )  # fmt: skip


def build_sparsemixer(p: Problem) -> dict[str, Any]:
    """Logits close enough together that several experts share a weight."""
    import torch

    logits = 1.0 + 0.02 * p.normal(p.T, p.E)
    if p.instance.dims.get("ONE_EXPERT"):
        logits[:, 5] += 5.0
    if p.instance.dims.get("FLAT"):
        flatten(logits)
    return {
        "logit_ptr": p.put("logit_ptr", logits),
        "index_ptr": p.output("index_ptr", p.T, p.TOP_K), "weight_ptr": p.output("weight_ptr", p.T, p.TOP_K),
        "count_ptr": torch.zeros(p.E, dtype=torch.int32), "T": p.T, "route_scale": 1.5, "jitter": 0.01,
    }  # fmt: skip


def reference_sparsemixer(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    """Token by token, in float64; the thresholds are compared in float32 as they are stored."""
    import torch

    index = torch.zeros(p.T, p.TOP_K, dtype=torch.long)
    weight = torch.zeros(p.T, p.TOP_K, dtype=torch.float64)
    for t, logit in enumerate(x["logit_ptr"]):
        left = logit.clone()
        for k in range(p.TOP_K):
            best = left.max()
            near = best - logit <= 2 * x["jitter"] * torch.maximum(logit.abs(), best)
            index[t, k] = left.argmax()
            weight[t, k] = left.double().masked_fill(~near, -torch.inf).softmax(-1)[index[t, k]]
            left[index[t, k]] = -torch.inf
    if p.NORMALISE:
        weight /= weight.sum(-1, keepdim=True)
    return {
        "index_ptr": Expected(index),
        "weight_ptr": Expected(weight * x["route_scale"], 2e-6, 1e-7, 1e-5),
        "count_ptr": Expected(torch.bincount(index.flatten(), minlength=p.E)),
    }


def sparsemixer_constants(d: Dims) -> dict[str, Constant]:
    sizes = {"E": d["E"], "E2": power_of_two(d["E"]), "TOP_K": d["TOP_K"], "TOP_K2": power_of_two(d["TOP_K"])}
    return {**sizes, "NORMALISE": bool(d["NORMALISE"])}


SPARSEMIXER = KernelSpec(
    name="route_sparsemixer",
    function="routing:sparsemixer",
    ops=("moe.route",),
    summary="Experts one after the other, weighed among those near the best: Phi-3.5-MoE",
    signature={
        "logit_ptr": "*fp32", "index_ptr": "*i32", "weight_ptr": "*fp32", "count_ptr": "*i32", "T": "i32",
        "route_scale": "fp32", "jitter": "fp32",
    },
    dims={"T": 128, "E": 16, "TOP_K": 2, "NORMALISE": 0},
    constants=sparsemixer_constants,
    tiles=on(EVERYWHERE, any=Tile({"BT": 4}, 4, 1)),
    grid=("ceildiv(T, BT)",),
    build=build_sparsemixer,
    reference=reference_sparsemixer,
    cases=(
        Case("21 tokens", {"T": 21}),
        Case("one token, three of six, normalised", {"T": 1, "E": 6, "TOP_K": 3, "NORMALISE": 1}),
        Case("all tokens to one expert", {"T": 9, "ONE_EXPERT": 1}),
        FLAT,
    ),
    flops="T*E*TOP_K*6",
    bytes="T*(4*E + 8*TOP_K) + 8*E",
)  # fmt: skip


def router(softmax: bool, bias: bool, pairs: bool, normalise: bool) -> KernelSpec:
    """The router of a gate's attributes; `pairs`: a group's score is the sum of its two best."""
    parts = ["softmax" if softmax else "sigmoid", "bias" * bias, "pairs" * (pairs and not bias)]
    parts += ["normalised" * (normalise and not bias), "raw" * (bias and not normalise), "best" * (bias and not pairs)]
    name = "_".join(["route", *filter(None, parts)])
    return route(name, "Scores, choice and counts", V3, bias, softmax, normalise, ROUTER_CASES, pairs)


ROUTER_CASES = tuple(
    Case(case.name, {"E": 24, "NG": 4, "TOP_GROUPS": 2, "TOP_K": 3, **case.dims})
    for case in (Case("one token", {"T": 1}), Case("all tokens to one expert", {"T": 9, "ONE_EXPERT": 1}), FLAT)
)
V3 = {"T": 128, "E": 256, "NG": 8, "TOP_GROUPS": 4, "TOP_K": 8}
SPECS = (
    route(
        "route_sigmoid_bias", "Sigmoid scores, bias-corrected group-limited top-k, normalised: DeepSeek-V3", V3,
        True, False, True,
        (
            Case("21 tokens", {"T": 21}),
            Case("one token", {"T": 1}),
            Case("all tokens to one expert", {"T": 9, "ONE_EXPERT": 1}),
            FLAT,
            Case("384 experts, one group", {"T": 6, "E": 384, "NG": 1, "TOP_GROUPS": 1}),
            Case("64 experts, top 6", {"T": 5, "E": 64, "NG": 1, "TOP_GROUPS": 1, "TOP_K": 6}),
        ),
    ),
    route(
        "route_softmax", "Softmax scores, group-limited top-k without bias: DeepSeek-V2",
        {"T": 128, "E": 160, "NG": 8, "TOP_GROUPS": 3, "TOP_K": 6}, False, True, False,
        (
            Case("160 experts in 8 groups", {"T": 13}),
            Case("64 experts, one group", {"T": 3, "E": 64, "NG": 1, "TOP_GROUPS": 1}),
            Case("one token", {"T": 1}),
            Case("all tokens to one expert", {"T": 9, "ONE_EXPERT": 1}),
            FLAT,
        ),
    ),
    route(
        "route_softmax_normalised", "Softmax scores, top-k, normalised",
        {"T": 128, "E": 128, "NG": 1, "TOP_GROUPS": 1, "TOP_K": 8}, False, True, True,
        (
            Case("7 tokens", {"T": 7}),
            Case("one token", {"T": 1}),
            Case("all tokens to one expert", {"T": 9, "ONE_EXPERT": 1}),
            FLAT,
        ),
    ),
    SPARSEMIXER,
)  # fmt: skip
