"""Declarations of attention with grouped heads: prefill, and a share of the keys in decode."""

from __future__ import annotations

from typing import Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.recipe import FP8, hard_rows, power_of_two, starts, weight_rounding

LENGTHS = ((5, 70), (1, 64), (133, 37), (4097, 4094))
QUERIES = ((5, 70), (1, 64), (33, 30), (1, 3))
FLAGS = {"WINDOW": 0, "CHUNK": 0, "SOFTCAP": 0}
"""What a query sees of the keys before it, and whether scores are bounded; 0 for neither."""
BOUND = 2.5
"""The bound of scores where a case has one: low enough to show."""


def spans(p: Problem) -> tuple[list[int], list[int]]:
    """Queries and cached positions of every sequence."""
    if p.LOAD < 0:
        return [p.QUERIES or p.CONTEXT] * p.B, [p.CONTEXT] * p.B
    return [p.QUERIES] * p.B if p.QUERIES else list(QUERIES[p.LOAD]), list(LENGTHS[p.LOAD])


def build(p: Problem) -> dict[str, Any]:
    import torch

    queries, lengths = spans(p)
    pages = max(-(-n // p.PAGE) for n in lengths)
    total = p.B * pages + 3
    width = p.KV_HEADS * (p.D + p.DV)
    cache = p.put("cache_ptr", hard_rows(p.normal(total * p.PAGE, width)))
    table = p.shuffled(total)[: p.B * pages].view(p.B, pages).to(torch.int32)
    # What lies behind a sequence's end in its last page belongs to nobody.
    for b, n in enumerate(lengths):
        if n % p.PAGE:
            last = int(table[b, n // p.PAGE]) * p.PAGE
            cache[last + n % p.PAGE : last + p.PAGE] = float("nan")
    rows = p.HEADS * (p.QUERIES or 1)
    out = (p.B, p.SPLITS, rows, p.DV) if p.SPLIT else (sum(queries), p.HEADS, p.DV)
    return {
        "q_ptr": p.put("q_ptr", p.normal(sum(queries), p.HEADS, p.D)), "cache_ptr": cache, "pages_ptr": table,
        "q_start_ptr": starts(queries), "length_ptr": torch.tensor(lengths, dtype=torch.int32),
        **({"sink_ptr": p.put("sink_ptr", p.normal(p.HEADS))} if p.SINKS else {}),
        "out_ptr": p.output("out_ptr", *out),
        **({"lse_ptr": p.output("lse_ptr", p.B, p.SPLITS, rows)} if p.SPLIT else {}),
        "q_row": p.HEADS * p.D, "q_head": p.D, "softmax_scale": p.D**-0.5, "softcap": BOUND, "max_pages": pages,
        "splits": p.SPLITS, "ROWS": rows,
    }  # fmt: skip


def scores(p: Problem, x: dict[str, Any], b: int, q: Any, first: int) -> tuple[Any, Any]:
    """Float64 scores [queries, HEADS, keys] of a sequence, -inf where a query does not see, and its values."""
    import torch

    length = int(x["length_ptr"][b])
    slots = x["pages_ptr"][b].long()[:, None] * p.PAGE + torch.arange(p.PAGE)
    kv = x["cache_ptr"][slots.flatten()[:length]].double()
    repeated = [
        part.unflatten(1, (p.KV_HEADS, -1)).repeat_interleave(p.HEADS // p.KV_HEADS, 1)
        for part in kv.split([p.KV_HEADS * p.D, p.KV_HEADS * p.DV], 1)
    ]
    score = torch.einsum("qhd,khd->qhk", q.double(), repeated[0]) * x["softmax_scale"]
    if p.SOFTCAP:
        score = (score / x["softcap"]).tanh() * x["softcap"]
    position, key = (first + torch.arange(len(q)))[:, None], torch.arange(length)[None]
    seen = key <= position
    if p.WINDOW:
        seen &= key > position - p.WINDOW
    if p.CHUNK:
        seen &= key >= position // p.CHUNK * p.CHUNK
    return score.masked_fill(~seen[:, None], -torch.inf), repeated[1]


def reference(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    """Attention in float64, row by row; the shares of a split are joined before they are compared."""
    import torch

    queries = x["q_start_ptr"].diff().tolist()
    out = torch.zeros(sum(queries), p.HEADS, p.DV, dtype=torch.float64)
    magnitude = torch.zeros_like(out)
    lse = torch.zeros(sum(queries), p.HEADS, dtype=torch.float64)
    for b, count in enumerate(queries):
        at = slice(int(x["q_start_ptr"][b]), int(x["q_start_ptr"][b]) + count)
        score, value = scores(p, x, b, x["q_ptr"][at], int(x["length_ptr"][b]) - count)
        if p.SINKS:
            sink = x["sink_ptr"].double()[None, :, None].expand(count, -1, 1)
            score, value = torch.cat([score, sink], -1), torch.cat([value, torch.zeros_like(value[:1])])
        weight = score.softmax(-1)
        out[at] = torch.einsum("qhk,khd->qhd", weight, value)
        magnitude[at] = torch.einsum("qhk,khd->qhd", weight, value.abs())
        lse[at] = score.logsumexp(-1) / torch.tensor(2.0).double().log()
    error = weight_rounding(x["q_ptr"])
    if not p.SPLIT:
        return {"out_ptr": Expected(out, error, gpu_absolute=2e-3, floor=error * magnitude)}
    shape = (p.B, -1, p.DV)

    def joined(written: dict[str, Any]) -> Any:
        share = torch.exp2(written["lse_ptr"].double() - lse.view(p.B, 1, -1))
        return (share[..., None] * written["out_ptr"].double()).sum(1)

    def total(written: dict[str, Any]) -> Any:
        return torch.exp2(written["lse_ptr"].double()).sum(1).log2()

    floor = error * magnitude.view(shape)
    return {
        "out_ptr": Expected(out.view(shape), 1e-6, gpu_absolute=2e-3, floor=floor, read=joined),
        "lse_ptr": Expected(lse.view(p.B, -1), 3e-6, 1e-6, 1e-4, read=total),
    }


FLOAT = dict.fromkeys(("q_ptr", "cache_ptr"), "*fp32")
SMALL = {"B": 2, "HEADS": 8, "KV_HEADS": 2, "D": 64, "DV": 64}


def attention(split: bool, sinks: bool) -> KernelSpec:
    def constants(d: Dims) -> dict[str, Constant]:
        keep = ("HEADS", "KV_HEADS", "D", "DV", "PAGE", "WINDOW", "CHUNK")
        flags: dict[str, Constant] = {"SOFTCAP": bool(d["SOFTCAP"]), "SINKS": sinks}
        absent: dict[str, Constant] = {} if sinks else {"sink_ptr": None}
        absent |= {} if split else {"lse_ptr": None}
        sizes = {n: d[n] for n in keep} | {"D2": max(16, power_of_two(d["D"])), "DV2": max(16, power_of_two(d["DV"]))}
        return {**absent, **sizes, **flags, "SPLIT": split}

    few, many = {"BM": 16, "BN": 64}, {"BM": 128, "BN": 64}
    tiles = on(("sm_80", "sm_90a", "sm_100a"), any=Tile(few, 4, 3)) | on(("gfx942",), any=Tile(few, 4, 1))
    if not split:
        tiles = on(FP8, any=Tile(many, 8, 3)) | on(("sm_80",), any=Tile({"BM": 64, "BN": 32}, 4, 2))
        tiles |= on(("gfx942",), any=Tile({"BM": 64, "BN": 32}, 4, 1))
    rows = "QUERIES * HEADS // KV_HEADS" if split else "CONTEXT * HEADS // KV_HEADS"
    read = "B*CONTEXT*KV_HEADS*(D + DV)*2"
    return KernelSpec(
        name=("heads_decode_split" if split else "heads_prefill") + ("_sinks" if sinks else ""),
        function="heads:heads_attention",
        ops=("attn.heads",),
        summary="Grouped heads over the paged cache: "
        + ("a share of the keys for few queries" if split else "ragged sequences with a cached prefix")
        + (", a sink for every head" if sinks else ""),
        signature={
            "q_ptr": "*bf16", "cache_ptr": "*bf16", "pages_ptr": "*i32", "q_start_ptr": "*i32", "length_ptr": "*i32",
            **({"sink_ptr": "*bf16"} if sinks else {}), "out_ptr": "*fp32" if split else "*bf16",
            **({"lse_ptr": "*fp32"} if split else {}), "q_row": "i64", "q_head": "i64", "softmax_scale": "fp32",
            "softcap": "fp32", "max_pages": "i32", "splits": "i32", "ROWS": "i32",
        },
        dims={
            "B": 32 if split else 4, "HEADS": 32, "KV_HEADS": 8, "D": 128, "DV": 128, "PAGE": 64, "CONTEXT": 4096,
            "QUERIES": 1 if split else 0, "SPLITS": 4 if split else 1, "LOAD": -1, **FLAGS,
        },
        constants=constants,
        tiles=tiles,
        grid=(f"ceildiv({rows}, BM)", "KV_HEADS", "B * SPLITS"),
        build=build,
        reference=reference,
        cases=SINK_CASES[split] if sinks else SPLIT_CASES if split else PREFILL_CASES,
        flops=f"2*B*{'QUERIES' if split else 'CONTEXT // 2'}*HEADS*CONTEXT*(D + DV)",
        bytes=f"{read} + 2*B*{'QUERIES' if split else 'CONTEXT'}*HEADS*(D + DV)",
        aligned=("q_row", "q_head"),
        requires=("PAGE % BN == 0", "HEADS % KV_HEADS == 0", "D % 8 == 0", "DV % 8 == 0"),
        tensor_core=not split,
        spares=SPARES[split],
    )  # fmt: skip


SPARES = {
    True: (
        Tile({"BM": 16, "BN": 64}, 4, 2),
        Tile({"BM": 16, "BN": 64}, 8, 2),
        Tile({"BM": 16, "BN": 32}, 4, 3),
        Tile({"BM": 16, "BN": 32}, 4, 2),
    ),
    False: (Tile({"BM": 64, "BN": 64}, 4, 3), Tile({"BM": 64, "BN": 64}, 4, 2), Tile({"BM": 64, "BN": 32}, 4, 2)),
}
"""For heads of other widths than the declared tiles were chosen for."""
PREFILL_CASES = (
    Case("5 and 70 tokens", {**SMALL, "CONTEXT": 70, "LOAD": 0}),
    Case("the same in float32", {**SMALL, "CONTEXT": 70, "LOAD": 0}, {**FLOAT, "out_ptr": "*fp32"}, interpreted=True),
    Case("1 and 64 tokens, one head a key", {**SMALL, "KV_HEADS": 8, "CONTEXT": 64, "LOAD": 1}),
    Case("prefix of 100 and 7, window of 20", {**SMALL, "CONTEXT": 33, "LOAD": 2, "WINDOW": 20}),
    Case("prefix, chunks of 48", {**SMALL, "CONTEXT": 33, "LOAD": 2, "CHUNK": 48}),
    Case("widths 80 and 48, five heads a key",
         {"B": 2, "HEADS": 10, "KV_HEADS": 2, "D": 80, "DV": 48, "CONTEXT": 33, "LOAD": 2}),
    Case("4097 keys, one query and three, window of 1000", {**SMALL, "CONTEXT": 3, "LOAD": 3, "WINDOW": 1000}),
)  # fmt: skip
SPLIT_CASES = (
    Case("lengths 5 and 70", {**SMALL, "LOAD": 0, "SPLITS": 3}),
    Case("the same in float32", {**SMALL, "LOAD": 0, "SPLITS": 3}, FLOAT, interpreted=True),
    Case("lengths 1 and 64, empty shares", {**SMALL, "LOAD": 1, "SPLITS": 4}),
    Case("window of 20, two query tokens", {**SMALL, "LOAD": 2, "SPLITS": 2, "WINDOW": 20, "QUERIES": 2}),
    Case("40 heads a key in three blocks", {**SMALL, "HEADS": 40, "KV_HEADS": 1, "LOAD": 2, "SPLITS": 2, "SOFTCAP": 1}),
    Case("lengths 4097 and 4094, chunks of 1024", {**SMALL, "LOAD": 3, "SPLITS": 5, "CHUNK": 1024}, slow=True),
)  # fmt: skip
SINK_CASES = {
    False: (
        Case("prefix, bounded scores", {**SMALL, "CONTEXT": 33, "LOAD": 2, "SOFTCAP": 1}),
        Case("1 and 64 tokens", {**SMALL, "CONTEXT": 64, "LOAD": 1}),
        Case("4097 keys, one query and three", {**SMALL, "CONTEXT": 3, "LOAD": 3}, slow=True),
    ),
    True: (
        Case("lengths 1 and 64, empty shares", {**SMALL, "LOAD": 1, "SPLITS": 4}),
        Case("lengths 4097 and 4094", {**SMALL, "LOAD": 3, "SPLITS": 5}, slow=True),
        Case("a window in float32", {**SMALL, "LOAD": 2, "SPLITS": 2, "WINDOW": 9}, {**FLOAT, "sink_ptr": "*fp32"},
             interpreted=True),
    ),
}  # fmt: skip
SPECS = tuple(attention(split, sinks) for split in (True, False) for sinks in (False, True))
