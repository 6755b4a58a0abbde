"""Declarations of the lightning indexer: scores of cached positions, and their choice (DeepSeek-V3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.recipe import EVERYWHERE, hard_rows, power_of_two

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

POSITIONS = ((0, 3, 70, 40), (5, 6, 7, 4096), (200, 200, 199, 0))
"""Positions of the tokens of a case; tokens take turns between two sequences."""


def positions(p: Problem) -> Tensor:
    import torch

    given = POSITIONS[p.LOAD][: p.T] if p.LOAD >= 0 else [p.CONTEXT - 1] * p.T
    return torch.tensor(given, dtype=torch.int32)


def build_scores(p: Problem) -> dict[str, Any]:
    import torch

    pages, row = -(-p.CONTEXT // p.PAGE), p.KEY_ROW
    total = 2 * pages + 1
    cache = p.put("key_ptr", hard_rows(p.normal(total * p.PAGE, row)))
    return {
        "q_ptr": p.put("q_ptr", p.normal(p.T, p.HEADS, p.DIM)),
        "weight_ptr": p.put("weight_ptr", p.normal(p.T, p.HEADS)),
        "key_ptr": cache[:, row - p.DIM :], "pages_ptr": p.shuffled(total)[: 2 * pages].view(2, pages).to(torch.int32),
        "seq_ptr": (torch.arange(p.T) % 2).to(torch.int32), "pos_ptr": positions(p),
        "score_ptr": p.output("score_ptr", p.T, p.CONTEXT), "q_row": p.HEADS * p.DIM, "q_head": p.DIM,
        "weight_row": p.HEADS, "scale": (p.HEADS * p.DIM) ** -0.5, "max_pages": pages, "width": p.CONTEXT,
    }  # fmt: skip


def reference_scores(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    import torch

    score = torch.zeros(p.T, p.CONTEXT, dtype=torch.float64)
    magnitude = torch.zeros_like(score)
    seen = torch.zeros(p.T, p.CONTEXT, dtype=torch.bool)
    for t, position in enumerate(x["pos_ptr"].tolist()):
        if position < p.TOP:
            continue
        slots = x["pages_ptr"][t % 2].long()[:, None] * p.PAGE + torch.arange(p.PAGE)
        key = x["key_ptr"][slots.flatten()[: position + 1]].double()
        product = (x["q_ptr"][t].double() @ key.T * x["scale"]).relu()
        weight = x["weight_ptr"][t].double()
        score[t, : position + 1] = weight @ product
        magnitude[t, : position + 1] = weight.abs() @ product
        seen[t, : position + 1] = True
    return {"score_ptr": Expected(score, 1e-6, 1e-6, floor=1e-6 * magnitude, where=seen)}


def scores_constants(d: Dims) -> dict[str, Constant]:
    keep: dict[str, Constant] = {n: d[n] for n in ("HEADS", "DIM", "PAGE", "KEY_ROW", "TOP")}
    return {**keep, "HEADS2": max(16, power_of_two(d["HEADS"])), "DIM2": max(16, power_of_two(d["DIM"]))}


FLOAT = dict.fromkeys(("q_ptr", "weight_ptr", "key_ptr"), "*fp32")
MANY_HEADS = {"T": 1, "HEADS": 64, "DIM": 128, "KEY_ROW": 192, "LOAD": 2, "CONTEXT": 256}
SMALL = {"T": 4, "HEADS": 3, "DIM": 16, "KEY_ROW": 40, "TOP": 5, "CONTEXT": 128}
SCORES = KernelSpec(
    name="index_scores",
    function="indexer:index_scores",
    ops=("attn.index",),
    summary="Index scores of the cached positions that a token sees",
    signature={
        "q_ptr": "*bf16", "weight_ptr": "*bf16", "key_ptr": "*bf16", "pages_ptr": "*i32", "seq_ptr": "*i32",
        "pos_ptr": "*i32", "score_ptr": "*fp32", **dict.fromkeys(("q_row", "q_head", "weight_row"), "i64"),
        "scale": "fp32", "max_pages": "i32", "width": "i32",
    },
    dims={"T": 128, "HEADS": 64, "DIM": 128, "PAGE": 64, "KEY_ROW": 704, "TOP": 2048, "CONTEXT": 4096, "LOAD": -1},
    constants=scores_constants,
    tiles=on(EVERYWHERE, any=Tile({"BN": 64}, 4, 1)) | on(("sm_100a",), any=Tile({"BN": 64}, 8, 1)),
    grid=("ceildiv(CONTEXT, BN)", "T"),
    build=build_scores,
    reference=reference_scores,
    cases=(
        Case("positions 0, 3, 70 and 40", {**SMALL, "LOAD": 0}),
        Case("the same in float32", {**SMALL, "LOAD": 0}, FLOAT, interpreted=True),
        Case("64 heads, one token", {**SMALL, **MANY_HEADS}),
        Case("4097 positions", {**SMALL, "LOAD": 1, "CONTEXT": 4160}, slow=True),
    ),
    flops="2*T*HEADS*CONTEXT*(DIM + 1)",
    bytes="2*T*CONTEXT*DIM + 4*T*CONTEXT + 2*T*HEADS*(DIM + 1)",
    aligned=("q_row", "q_head"),
    requires=("PAGE % BN == 0",),
    tensor_core=True,
    loose=("key_ptr",),
)  # fmt: skip


def build_select(p: Problem) -> dict[str, Any]:
    """Scores by KIND: 0 any, 1 many equal ones, 2 tiny negative ones and zeros of both signs."""
    score = p.normal(p.T, p.CONTEXT)
    if p.KIND == 1:
        score = (2 * score).round()
    elif p.KIND == 2:
        score = score.abs() * -1e-39
        score[:, ::3], score[:, 1::3] = -0.0, 0.0
    position = positions(p)
    for t, last in enumerate(position.tolist()):
        score[t, last + 1 :] = float("nan")
    return {
        "score_ptr": score, "pos_ptr": position, "chosen_ptr": p.output("chosen_ptr", p.T, p.TOP), "width": p.CONTEXT,
    }  # fmt: skip


def reference_select(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    import torch

    chosen = torch.full((p.T, p.TOP), -1)
    for t, last in enumerate(x["pos_ptr"].tolist()):
        best = torch.sort(-x["score_ptr"][t, : last + 1].double(), stable=True).indices[: p.TOP].sort().values
        chosen[t, : len(best)] = best
    return {"chosen_ptr": Expected(chosen)}


def select_constants(d: Dims) -> dict[str, Constant]:
    return {"TOP": d["TOP"]}


FEW = {"T": 4, "TOP": 9, "CONTEXT": 256, "LOAD": 0}
SELECT = KernelSpec(
    name="index_select",
    function="indexer:index_select",
    ops=("attn.index",),
    summary="Positions of the best index scores, in rising order",
    signature={"score_ptr": "*fp32", "pos_ptr": "*i32", "chosen_ptr": "*i32", "width": "i32"},
    dims={"T": 128, "TOP": 2048, "CONTEXT": 4096, "LOAD": -1, "KIND": 0},
    constants=select_constants,
    tiles=on(EVERYWHERE, any=Tile({"BLOCK": 1024}, 4, 1)),
    grid=("T",),
    build=build_select,
    reference=reference_select,
    cases=(
        Case("positions 0, 3, 70 and 40", FEW),
        Case("equal scores go by position", {**FEW, "KIND": 1}),
        Case("zeros and subnormals", {**FEW, "KIND": 2, "LOAD": 2}),
        Case("one token, 64 of 256", {**FEW, "T": 1, "TOP": 64, "LOAD": 2}),
        Case("4097 positions, equal scores", {**FEW, "LOAD": 1, "KIND": 1, "CONTEXT": 4160}),
    ),
    flops="12*T*CONTEXT",
    bytes="4*T*CONTEXT + 4*T*TOP",
)  # fmt: skip

SPECS = (SCORES, SELECT)
