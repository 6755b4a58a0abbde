"""Declaration of latent attention in prefill, over up-projected keys and values."""

from __future__ import annotations

from typing import Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.recipe import FP8, hard_rows, starts, weight_rounding

# Queries and cached prefix of the sequences of a batch: what the test cases vary.
QUERIES = ((5, 70), (1, 64), (33, 130), (200, 1), (1, 3))
PREFIXES = ((0, 0), (0, 0), (100, 7), (313, 3), (4096, 4094))


def prefill_spans(p: Problem) -> tuple[list[int], list[int]]:
    """Queries and keys of every sequence."""
    if p.LOAD < 0:
        return [p.CONTEXT] * p.B, [p.CONTEXT] * p.B
    return list(QUERIES[p.LOAD]), [q + c for q, c in zip(QUERIES[p.LOAD], PREFIXES[p.LOAD], strict=True)]


def build_prefill(p: Problem) -> dict[str, Any]:
    queries, keys = prefill_spans(p)
    return {
        "q_ptr": p.put("q_ptr", p.normal(sum(queries), p.HEADS, p.DN + p.DR)),
        "kv_ptr": p.put("kv_ptr", hard_rows(p.normal(sum(keys), p.HEADS, p.DN + p.DV))),
        "rope_ptr": p.put("rope_ptr", p.normal(sum(keys), p.DR)),
        "q_start_ptr": starts(queries), "k_start_ptr": starts(keys),
        "out_ptr": p.output("out_ptr", sum(queries), p.HEADS, p.DV), "q_row": p.HEADS * (p.DN + p.DR),
        "softmax_scale": (p.DN + p.DR) ** -0.5,
    }  # fmt: skip


def reference_prefill(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    import torch

    out = torch.empty(x["out_ptr"].shape, dtype=torch.float64)
    magnitude = torch.empty_like(out)
    q_start, k_start = x["q_start_ptr"].tolist(), x["k_start_ptr"].tolist()
    for s in range(len(q_start) - 1):
        q = x["q_ptr"][q_start[s] : q_start[s + 1]].double()
        kv = x["kv_ptr"][k_start[s] : k_start[s + 1]].double()
        rope = x["rope_ptr"][k_start[s] : k_start[s + 1]].double()
        score = torch.einsum("qhd,khd->hqk", q[..., : p.DN], kv[..., : p.DN])
        score += torch.einsum("qhd,kd->hqk", q[..., p.DN :], rope)
        after = torch.arange(len(kv))[None] > (len(kv) - len(q) + torch.arange(len(q)))[:, None]
        weight = torch.softmax((score * x["softmax_scale"]).masked_fill(after, -torch.inf), -1)
        value = kv[..., p.DN :]
        out[q_start[s] : q_start[s + 1]] = torch.einsum("hqk,khd->qhd", weight, value)
        magnitude[q_start[s] : q_start[s + 1]] = torch.einsum("hqk,khd->qhd", weight, value.abs())
    error = weight_rounding(x["q_ptr"])
    return {"out_ptr": Expected(out, error, gpu_absolute=2e-3, floor=error * magnitude)}


def prefill_constants(dims: Dims) -> dict[str, Constant]:
    return {n: dims[n] for n in ("HEADS", "DN", "DV", "DR")}


PREFILL_FLOAT = dict.fromkeys(("q_ptr", "kv_ptr", "rope_ptr", "out_ptr"), "*fp32")
PREFILL = KernelSpec(
    name="mla_prefill",
    function="attention:mla_prefill",
    ops=("attn.mla",),
    summary="Causal attention, head dims 192 and 128, ragged sequences with a cached prefix",
    signature={
        "q_ptr": "*bf16", "kv_ptr": "*bf16", "rope_ptr": "*bf16", "q_start_ptr": "*i32", "k_start_ptr": "*i32",
        "out_ptr": "*bf16", "q_row": "i64", "softmax_scale": "fp32",
    },
    dims={"B": 4, "HEADS": 128, "DN": 128, "DV": 128, "DR": 64, "CONTEXT": 4096, "LOAD": -1},
    constants=prefill_constants,
    tiles=on(FP8, any=Tile({"BM": 128, "BN": 64}, 8, 2))
    | on(("sm_80",), any=Tile({"BM": 64, "BN": 32}, 4, 2))
    | on(("gfx942",), any=Tile({"BM": 64, "BN": 32}, 4, 1)),
    grid=("ceildiv(CONTEXT, BM)", "HEADS", "B"),
    build=build_prefill,
    reference=reference_prefill,
    cases=(
        Case("5 and 70 tokens", {"B": 2, "HEADS": 2, "CONTEXT": 70, "LOAD": 0}),
        Case("5 and 70, float32", {"B": 2, "HEADS": 2, "CONTEXT": 70, "LOAD": 0}, PREFILL_FLOAT, interpreted=True),
        Case("1 and 64 tokens", {"B": 2, "HEADS": 3, "CONTEXT": 64, "LOAD": 1}),
        Case("prefix of 100 and 7", {"B": 2, "HEADS": 2, "CONTEXT": 130, "LOAD": 2}),
        Case("the same in float32", {"B": 2, "HEADS": 2, "CONTEXT": 130, "LOAD": 2}, PREFILL_FLOAT, interpreted=True),
        Case("prefix of 313, several blocks", {"B": 2, "HEADS": 1, "CONTEXT": 200, "LOAD": 3}),
        Case("4097 keys, one query and three", {"B": 2, "HEADS": 1, "CONTEXT": 3, "LOAD": 4}),
    ),
    flops="B*HEADS*CONTEXT*CONTEXT*(DN + DR + DV)",
    bytes="2*B*CONTEXT*(HEADS*(DN + DR + DN + 2*DV) + DR)",
    aligned=("q_row",),
    tensor_core=True,
)  # fmt: skip


SPECS = (PREFILL,)
