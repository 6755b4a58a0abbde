"""Declaration of the choice of the next token."""

from __future__ import annotations

from typing import Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.recipe import EVERYWHERE


def no_constants(dims: Dims) -> dict[str, Constant]:
    return {}


def build(p: Problem) -> dict[str, Any]:
    """Rows of all kinds: greedy, whole, nucleus, top-k, both, min-p. TIES: few different logits; 2: tiny ones."""
    import torch

    logits = p.normal(p.T, p.V, scale=2.0)
    if p.TIES:
        logits = logits.round()
    rows = torch.arange(p.T)
    if p.TIES == 2:
        logits[::2], logits[1::2] = 0.0, 1e-40 * logits[1::2]
    elif p.T > 1:
        logits[1, :-1] = float("-inf")
    return {
        "logit_ptr": p.put("logit_ptr", logits),
        "temperature_ptr": torch.where(rows % 7 < 2, 0.0, 0.5 + p.uniform(p.T).cpu()),
        "top_k_ptr": torch.tensor([0, 5, 0, 0, 20, 40, 0])[rows % 7].to(torch.int32),
        "top_p_ptr": torch.tensor([1.0, 0.5, 1.0, 0.9, 1.0, 0.8, 0.97])[rows % 7],
        "min_p_ptr": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.05])[rows % 7],
        "key_ptr": torch.randint(-(1 << 62), 1 << 62, (p.T,), generator=p.generator),
        "number_ptr": p.integers(0, 1000, p.T),
        "token_ptr": p.output("token_ptr", p.T),
        "V": p.V,
    }


def reference(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    """By sorting, in float64; a row whose draw or nucleus ends within rounding of a token's edge is not compared."""
    import torch

    from moec.runtime.draws import Draws

    tokens, clear = [], []
    for row in range(p.T):
        logits = x["logit_ptr"][row].double()
        if not x["temperature_ptr"][row]:
            top = logits.amax()
            tokens.append(int((logits == top).nonzero()[0]))
            clear.append(True)
            continue
        probability = (logits / x["temperature_ptr"][row].double()).softmax(-1)
        order = torch.sort(probability, descending=True, stable=True).indices
        if k := int(x["top_k_ptr"][row]):
            order = order[:k]
        sorted_ = probability[order] / probability[order].sum()
        before, share = sorted_.cumsum(-1) - sorted_, float(x["top_p_ptr"][row])
        kept = order[(before < share) | (share >= 1)]
        kept = kept[probability[kept] >= float(x["min_p_ptr"][row]) * probability[kept].amax()].sort().values
        mass = probability[kept].cumsum(-1)
        draw = Draws(int(x["key_ptr"][row]) % 2**64, int(x["number_ptr"][row]))
        target = mass[-1] * draw.random()
        tokens.append(int(kept[(mass > target).nonzero()[0]]))
        near = share < 1 and float((before - share).abs().amin()) < 1e-6
        clear.append(not near and float((mass - target).abs().amin() / mass[-1]) > 1e-6)

    def decided(written: dict[str, Any]) -> torch.Tensor:
        return torch.where(torch.tensor(clear), written["token_ptr"].double(), torch.tensor(tokens).double())

    return {"token_ptr": Expected(torch.tensor(tokens), read=decided)}


DRAW = KernelSpec(
    name="draw",
    function="sampling:draw",
    ops=("sample.draw",),
    summary="The largest logit, or a draw among the most probable ones (top-k, top-p, min-p)",
    signature={
        "logit_ptr": "*fp32", "temperature_ptr": "*fp32", "top_k_ptr": "*i32", "top_p_ptr": "*fp32",
        "min_p_ptr": "*fp32", "key_ptr": "*i64", "number_ptr": "*i32", "token_ptr": "*i32", "V": "i32",
    },
    dims={"T": 128, "V": 129280, "TIES": 0},
    constants=no_constants,
    tiles=on(EVERYWHERE, any=Tile({"BLOCK": 2048}, 8, 1)),
    grid=("T",),
    # A micro-batch begins anywhere among the rows.
    loose=("logit_ptr", "token_ptr"),
    build=build,
    reference=reference,
    cases=(
        Case("21 rows of 5000", {"T": 21, "V": 5000}),
        Case("14 rows with equals", {"T": 14, "V": 300, "TIES": 1}),
        Case("zeros and subnormals", {"T": 14, "V": 300, "TIES": 2}),
        Case("one row of 60", {"T": 1, "V": 60}),
    ),
    flops="T*V*35",
    bytes="4*T*V + 36*T",
)  # fmt: skip

SPECS = (DRAW,)
