"""Declarations of the router, the permutation and its inverse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.recipe import BF16_ROUNDING, EVERYWHERE, FP8, hard_rows, power_of_two, quantise_1x128

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor


FLOAT = {"x_ptr": "*fp32", "y_ptr": "*fp32"}


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


def pairs(p: Problem) -> Tensor:
    """Experts of every token by SKEW: 0 any, 1 all to one, 2 some of them another device's."""
    import torch

    if p.SKEW == 1:
        return torch.full((p.T, p.TOP_K), 2, dtype=torch.int32)
    chosen = torch.stack([p.shuffled(p.E)[: p.TOP_K] for _ in range(p.T)]).to(torch.int32)
    if p.SKEW == 2:
        # Experts of another device: outside this one's range on either side.
        chosen[::2, 0] = p.E + 3
        chosen[1::2, 0] = -1
    return chosen


def build_permutation(p: Problem) -> dict[str, Any]:
    import torch

    index = pairs(p)
    own = index[(index >= 0) & (index < p.E)].long()
    return {
        "index_ptr": index, "count_ptr": torch.bincount(own, minlength=p.E).to(torch.int32),
        "slot_ptr": p.output("slot_ptr", p.T * p.TOP_K), "source_ptr": p.output("source_ptr", p.R),
        **({} if p.ALIGN == 0 else {"block_expert_ptr": p.output("block_expert_ptr", p.R // p.ALIGN)}),
        "PAIRS": p.T * p.TOP_K, "ROWS": p.R, "capacity": p.CAPACITY,
    }  # fmt: skip


def reference_permutation(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    import torch

    slot = torch.full((p.T * p.TOP_K,), -1)
    source = torch.full((p.R,), -1)
    blocks = torch.full((p.R // p.ALIGN if p.ALIGN else 0,), -1)
    row = 0
    flat = x["index_ptr"].flatten()
    for e in range(p.E):
        mine = (flat == e).nonzero().flatten()
        first = e * p.CAPACITY if p.ALIGN == 0 else row
        slot[mine] = torch.arange(len(mine)) + first
        source[first : first + len(mine)] = mine // p.TOP_K
        row = first + (-(-len(mine) // p.ALIGN) * p.ALIGN if p.ALIGN else 0)
        if p.ALIGN:
            blocks[first // p.ALIGN : row // p.ALIGN] = e
    out = {"slot_ptr": Expected(slot), "source_ptr": Expected(source)}
    return out if p.ALIGN == 0 else {**out, "block_expert_ptr": Expected(blocks)}


PERMUTATION_CASES = (
    Case("9 tokens", {"T": 9, "TOP_K": 3, "E": 6, "SKEW": 0}),
    Case("all pairs to one expert", {"T": 40, "TOP_K": 1, "E": 4, "SKEW": 1}),
    Case("experts of other devices", {"T": 12, "TOP_K": 2, "E": 5, "SKEW": 2}),
    Case("one token", {"T": 1, "TOP_K": 2, "E": 3, "SKEW": 0}),
)


def permutation(masked: bool) -> KernelSpec:
    def constants(d: Dims) -> dict[str, Constant]:
        absent: dict[str, Constant] = {"block_expert_ptr": None} if masked else {}
        return {**absent, "E": d["E"], "E2": power_of_two(d["E"]), "TOP_K": d["TOP_K"], "ALIGN": d["ALIGN"]}

    def sized(case: Case) -> Case:
        rows = case.dims["E"] * 48 if masked else 512
        return Case(case.name, {**case.dims, "R": rows, "CAPACITY": 48 if masked else 0})

    space = {"R": 32768, "CAPACITY": 128, "ALIGN": 0} if masked else {"R": 17408, "CAPACITY": 0, "ALIGN": 64}
    return KernelSpec(
        name=f"permutation_{'masked' if masked else 'contiguous'}",
        function="routing:permutation",
        ops=("moe.dispatch", "moe.experts"),
        summary=f"Rows of every routed pair, sorted by expert; {'masked' if masked else 'contiguous'} layout",
        signature={
            "index_ptr": "*i32", "count_ptr": "*i32", "slot_ptr": "*i32", "source_ptr": "*i32",
            **({} if masked else {"block_expert_ptr": "*i32"}), "PAIRS": "i32", "ROWS": "i32", "capacity": "i32",
        },
        dims={"T": 128, "TOP_K": 8, "E": 256, **space, "SKEW": 0},
        constants=constants,
        tiles=on(EVERYWHERE, any=Tile({"BLOCK": 512}, 4, 1)),
        grid=("E",),
        build=build_permutation,
        reference=reference_permutation,
        cases=tuple(sized(c) for c in PERMUTATION_CASES),
        flops="0",
        bytes="8*T*TOP_K + 4*R",
    )  # fmt: skip


def build_permute(p: Problem) -> dict[str, Any]:
    import torch

    source = p.integers(0, p.T, p.R)
    source[::5] = -1
    if not p.SCALED:
        x = p.put("x_ptr", hard_rows(p.normal(p.T, p.D)))
        return {"x_ptr": x, "source_ptr": source, "y_ptr": p.output("y_ptr", p.R, p.D), "D": p.D}
    q, scale = quantise_1x128(hard_rows(p.normal(p.T, p.D)))
    return {
        "x_ptr": q, "scale_ptr": scale, "source_ptr": source.to(torch.int32), "y_ptr": p.output("y_ptr", p.R, p.D),
        "y_scale_ptr": p.output("y_scale_ptr", p.R, scale.shape[1]), "D": p.D,
    }  # fmt: skip


def reference_permute(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    at = x["source_ptr"].long()
    live = (at >= 0)[:, None]
    out = {"y_ptr": Expected(x["x_ptr"].float()[at.clamp(min=0)], where=live)}
    if p.SCALED:
        out["y_scale_ptr"] = Expected(x["scale_ptr"][at.clamp(min=0)], where=live)
    return out


def permute(scaled: bool) -> KernelSpec:
    def constants(d: Dims) -> dict[str, Constant]:
        return {"SCALED": True} if scaled else {"SCALED": False, "scale_ptr": None, "y_scale_ptr": None}

    kind = "*fp8e4nv" if scaled else "*bf16"
    return KernelSpec(
        name="permute_fp8" if scaled else "permute",
        function="routing:permute",
        ops=("moe.dispatch", "moe.experts"),
        summary=f"Token rows to expert-sorted rows, {'FP8 with scales' if scaled else 'BF16'}",
        signature={
            "x_ptr": kind, **({"scale_ptr": "*fp32"} if scaled else {}), "source_ptr": "*i32", "y_ptr": kind,
            **({"y_scale_ptr": "*fp32"} if scaled else {}), "D": "i32",
        },
        dims={"T": 128, "R": 1024, "D": 7168},
        constants=constants,
        tiles=on((*FP8, "gfx942") if scaled else EVERYWHERE, any=Tile({"BLOCK": 2048}, 4, 1)),
        grid=("R", "ceildiv(D, BLOCK)"),
        build=build_permute,
        reference=reference_permute,
        cases=(Case("12 rows", {"T": 9, "R": 12, "D": 2304}), Case("one token twice", {"T": 1, "R": 3, "D": 128})),
        flops="0",
        bytes="2*R*D + 8*R*ceildiv(D, 128) + 4*R" if scaled else "4*R*D + 4*R",
        aligned=("D",),
        requires=("D % 16 == 0",),
        fallback="permute" if scaled else "",
    )  # fmt: skip


def build_unpermute(p: Problem) -> dict[str, Any]:
    slot = p.integers(0, p.R, p.T, p.TOP_K)
    if p.T > 1:
        slot[1, 0] = -1
    shared = {"shared_ptr": p.put("shared_ptr", p.normal(p.T, p.D))} if p.SHARED else {}
    return {
        "x_ptr": p.put("x_ptr", hard_rows(p.normal(p.R, p.D))), "slot_ptr": slot,
        "weight_ptr": p.uniform(p.T, p.TOP_K), **shared,
        "y_ptr": p.output("y_ptr", p.T, p.D), "D": p.D,
    }  # fmt: skip


def reference_unpermute(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    at = x["slot_ptr"].long()
    weight = x["weight_ptr"].double() * (at >= 0)
    value = (x["x_ptr"].double()[at.clamp(min=0)] * weight[..., None]).sum(1)
    if p.SHARED:
        value += x["shared_ptr"].double()
    rounding = BF16_ROUNDING * 1.001 if p.instance.signature["y_ptr"] == "*bf16" else 0.0
    return {"y_ptr": Expected(value, rounding, 1e-6)}


def unpermute(shared: bool) -> KernelSpec:
    def constants(d: Dims) -> dict[str, Constant]:
        return {"TOP_K": d["TOP_K"], "SHARED": shared, **({} if shared else {"shared_ptr": None})}

    return KernelSpec(
        name="unpermute_shared" if shared else "unpermute",
        function="routing:unpermute",
        ops=("moe.combine", "moe.experts"),
        summary="Weighted sum of every token's expert rows" + (" and the shared expert's" if shared else ""),
        signature={
            "x_ptr": "*bf16", "slot_ptr": "*i32", "weight_ptr": "*fp32", **({"shared_ptr": "*bf16"} if shared else {}),
            "y_ptr": "*bf16", "D": "i32",
        },
        dims={"T": 128, "R": 1024, "D": 7168, "TOP_K": 8},
        constants=constants,
        tiles=on(EVERYWHERE, any=Tile({"BLOCK": 1024}, 4, 1)),
        grid=("T", "ceildiv(D, BLOCK)"),
        build=build_unpermute,
        reference=reference_unpermute,
        cases=(
            Case("5 tokens", {"T": 5, "R": 20, "D": 1200, "TOP_K": 3}),
            Case("one token, one expert, float32", {"T": 1, "R": 2, "D": 64, "TOP_K": 1}, FLOAT),
        ),
        flops="2*T*TOP_K*D",
        bytes="2*T*D*(TOP_K + " + ("2" if shared else "1") + ") + 8*T*TOP_K",
        aligned=("D",),
        requires=("D % 16 == 0",),
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
    permutation(False),
    permutation(True),
    permute(True),
    permute(False),
    unpermute(False),
    unpermute(True),
)  # fmt: skip
