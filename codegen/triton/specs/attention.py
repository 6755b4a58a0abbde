"""Declarations of latent attention in decode: absorbed, over the paged cache; and of reading that cache whole.

The FP8 cache row is 656 bytes: 512 of FP8 latent, four float32 scales, 64 BF16 of rotated key (the layout that
FlashMLA documents). One buffer holds it; the three parts are views with distances in their own elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.problem import MARK_FLOAT, Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, TileTable, on
from moec.codegen.triton.specs.recipe import (
    BF16_ROUNDING,
    FP8,
    NVIDIA,
    hard_rows,
    power_of_two,
    quantise_1x128,
    starts,
    weight_rounding,
    wide,
)

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

# Key counts of the sequences of a batch: what the test cases vary.
LENGTHS = ((70, 300), (1, 64), (2, 129), (4097, 5))


def cache_row(dv: int, dr: int, fp8: bool, index: int = 0) -> dict[str, int]:
    """Distances between cache rows in elements of each part; `index`: width of the index key behind a row."""
    if not fp8:
        return {"LATENT_ROW": dv + dr + index, "ROPE_ROW": dv + dr + index, "SCALE_ROW": 0}
    size = dv + 4 * (dv // 128) + 2 * dr
    return {"LATENT_ROW": size, "ROPE_ROW": size // 2, "SCALE_ROW": size // 4}


def fp8_cache(rows: int, dv: int, dr: int) -> tuple[Tensor, Tensor, Tensor]:
    """An unwritten FP8 cache: its latent, scale and rope views of one buffer."""
    import torch

    groups = dv // 128
    size = dv + 4 * groups + 2 * dr
    buffer = torch.full((rows, size), MARK_FLOAT, dtype=torch.uint8)
    latent = buffer[:, :dv].view(torch.float8_e4m3fn)
    scale = buffer[:, dv : dv + 4 * groups].view(torch.float32)
    return latent, scale, buffer[:, dv + 4 * groups :].view(torch.bfloat16)


def decode_cache(p: Problem, rows: int) -> tuple[dict[str, Any], Tensor]:
    """Cache arguments filled with random keys, and the float64 values [rows, DV+DR] they stand for."""
    import torch

    value = hard_rows(p.normal(rows, p.DV + p.DR + p.INDEX))
    if p.SCALE_ROW == 0:
        cache = p.put("latent_ptr", value)
        return {"latent_ptr": cache[:, : p.DV], "rope_ptr": cache[:, p.DV : p.DV + p.DR]}, cache.double()
    latent, scale, rope = fp8_cache(rows, p.DV, p.DR)
    q, s = quantise_1x128(value[:, : p.DV])
    latent.copy_(q)
    scale.copy_(s)
    rope.copy_(value[:, p.DV :])
    arguments = {"latent_ptr": latent, "rope_ptr": rope, "scale_ptr": scale}
    return arguments, torch.cat([wide(latent, scale), rope.double()], 1)


def sequence_lengths(p: Problem) -> list[int]:
    """The lengths of the case, or `CONTEXT` for every one of B sequences."""
    return [p.CONTEXT] * p.B if p.LOAD < 0 else list(LENGTHS[p.LOAD])


def query_distances(heads: int, width: int) -> dict[str, int]:
    """Between tokens and heads of queries whose latent and rotary parts lie side by side."""
    return {"q_row": heads * width, "q_head": width, "q_rope_row": heads * width, "q_rope_head": width}


def build_split(p: Problem) -> dict[str, Any]:
    import torch

    lengths = sequence_lengths(p)
    pages = max(-(-n // p.PAGE) for n in lengths)
    total = p.B * pages + 3
    cache, _ = decode_cache(p, total * p.PAGE)
    rows = p.HEADS * p.QUERIES
    q = p.put("q_ptr", p.normal(p.B, rows, p.DV + p.DR))
    return {
        "q_ptr": q[..., : p.DV], "q_rope_ptr": q[..., p.DV :], **cache,
        "pages_ptr": p.shuffled(total)[: p.B * pages].view(p.B, pages).to(torch.int32), **seen_keys(p, lengths),
        "partial_ptr": p.output("partial_ptr", p.B, p.SPLITS, rows, p.DV),
        "lse_ptr": p.output("lse_ptr", p.B, p.SPLITS, rows),
        **query_distances(p.HEADS, p.DV + p.DR), "softmax_scale": 192**-0.5, "max_pages": pages,
        "splits": p.SPLITS, "QUERIES": p.QUERIES, "ROWS": rows,
    }  # fmt: skip


def seen_keys(p: Problem, lengths: list[int]) -> dict[str, Any]:
    """How many keys a sequence has, or with TOP which of them its token sees: rising positions, then -1."""
    import torch

    if not p.TOP:
        return {"length_ptr": torch.tensor(lengths, dtype=torch.int32)}
    chosen = torch.full((p.B, p.TOP), -1, dtype=torch.int32)
    for b, n in enumerate(lengths):
        best = p.shuffled(n)[: p.TOP].sort().values
        chosen[b, : len(best)] = best
    # Tokens and their sequences run in opposite orders.
    return {
        "length_ptr": torch.tensor(lengths, dtype=torch.int32) - 1,
        "seq_ptr": torch.arange(p.B - 1, -1, -1, dtype=torch.int32), "chosen_ptr": chosen,
    }  # fmt: skip


def cached(p: Problem, x: dict[str, Any]) -> Tensor:
    """Float64 keys [rows, DV+DR] as the cache holds them; an FP8 latent is widened to the type of the queries."""
    import torch

    if p.SCALE_ROW == 0:
        latent = x["latent_ptr"].double()
    else:
        latent = wide(x["latent_ptr"], x["scale_ptr"]).to(x["q_ptr"].dtype).double()
    return torch.cat([latent, x["rope_ptr"].double()], 1)


def reference_split(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    """Softmax of each share of the keys in float64, and its base-2 log-sum-exp."""
    import torch

    whole = cached(p, x)
    keys = whole.view(-1, p.PAGE, whole.shape[1])
    rows = x["ROWS"]
    partial = torch.zeros(p.B, p.SPLITS, rows, p.DV, dtype=torch.float64)
    magnitude = torch.zeros_like(partial)
    lse = torch.full((p.B, p.SPLITS, rows), -torch.inf, dtype=torch.float64)
    query = torch.arange(rows) // p.HEADS
    for b, n in enumerate(x["length_ptr"].tolist()):
        kv = keys[x["pages_ptr"][int(x["seq_ptr"][b]) if p.TOP else b].long()].flatten(0, 1)
        if p.TOP:
            chosen = x["chosen_ptr"][b]
            kv = kv[chosen[chosen >= 0].long()]
            n = len(kv)
        kv = kv[:n]
        query_and_key = torch.cat([x["q_ptr"][b], x["q_rope_ptr"][b]], -1).double()
        score = query_and_key @ kv.T * x["softmax_scale"]
        score.masked_fill_(torch.arange(n)[None] > (n - p.QUERIES + query)[:, None], -torch.inf)
        blocks = -(-n // p.BN)
        per_share = -(-blocks // p.SPLITS) * p.BN
        for s in range(p.SPLITS):
            part = score[:, s * per_share : (s + 1) * per_share]
            if part.shape[1]:
                weight = torch.softmax(part, -1).nan_to_num()
                value = kv[s * per_share : (s + 1) * per_share, : p.DV]
                partial[b, s] = weight @ value
                magnitude[b, s] = weight @ value.abs()
                lse[b, s] = torch.logsumexp(part, -1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    return {
        "partial_ptr": Expected(partial, gpu_absolute=2e-3, floor=weight_rounding(x["q_ptr"]) * magnitude),
        "lse_ptr": Expected(lse, 2e-6, 1e-6, 1e-4),
    }


DISTANCES = ("q_row", "q_head", "q_rope_row", "q_rope_head")


def split_signature(fp8: bool, sparse: bool) -> dict[str, str]:
    cache = {"latent_ptr": "*bf16", "rope_ptr": "*bf16"}
    if fp8:
        cache = {"latent_ptr": "*fp8e4nv", "rope_ptr": "*bf16", "scale_ptr": "*fp32"}
    return {
        "q_ptr": "*bf16", "q_rope_ptr": "*bf16", **cache, "pages_ptr": "*i32", "length_ptr": "*i32",
        **({"seq_ptr": "*i32", "chosen_ptr": "*i32"} if sparse else {}), "partial_ptr": "*fp32",
        "lse_ptr": "*fp32", **dict.fromkeys(DISTANCES, "i64"), "softmax_scale": "fp32",
        "max_pages": "i32", "splits": "i32", "QUERIES": "i32", "ROWS": "i32",
    }  # fmt: skip


SPLIT_DIMS = {
    "B": 128, "HEADS": 128, "QUERIES": 1, "DV": 512, "DR": 64, "PAGE": 64, "CONTEXT": 4096, "SPLITS": 2, "LOAD": -1,
    "INDEX": 0, "TOP": 0,
}  # fmt: skip
FLOAT = dict.fromkeys(("q_ptr", "q_rope_ptr", "latent_ptr", "rope_ptr"), "*fp32")
SMALL = {"B": 2, "HEADS": 16, "SPLITS": 3}
SPLIT_CASES = (
    Case("lengths 70 and 300", {**SMALL, "LOAD": 0}),
    Case("lengths 70 and 300 in float32", {**SMALL, "LOAD": 0}, FLOAT, interpreted=True),
    Case("lengths 1 and 64, empty shares", {**SMALL, "LOAD": 1, "SPLITS": 4}),
    Case("two query tokens, a fresh sequence", {**SMALL, "LOAD": 2, "QUERIES": 2, "HEADS": 40}),
    Case("lengths 4097 and 5", {**SMALL, "LOAD": 3, "SPLITS": 5}, slow=True),
)


SPARSE = {**SMALL, "INDEX": 64, "TOP": 48}
SPARSE_CASES = (
    Case("48 of 70 and of 300", {**SPARSE, "LOAD": 0}),
    Case("48 of 70 and of 300 in float32", {**SPARSE, "LOAD": 0}, FLOAT, interpreted=True),
    Case("one key and 48 of 64", {**SPARSE, "LOAD": 1, "SPLITS": 4}),
    Case("130 of 4097, and 5", {**SPARSE, "TOP": 130, "LOAD": 3, "SPLITS": 2}, slow=True),
)


def decode_split(fp8: bool, sparse: bool = False) -> KernelSpec:
    def constants(dims: Dims) -> dict[str, Constant]:
        keep = {n: dims[n] for n in ("HEADS", "DV", "DR", "PAGE", "TOP")}
        rows = cache_row(dims["DV"], dims["DR"], fp8, dims["INDEX"])
        absent: dict[str, Constant] = {} if fp8 else {"scale_ptr": None}
        absent |= {} if sparse else {"seq_ptr": None, "chosen_ptr": None}
        return {**keep, **rows, **absent}

    many = {"BH": 64, "BN": 64}
    tiles: TileTable = {
        **on(("sm_90a",), any=Tile(many, 8, 2, spills=8 if fp8 else 0)),
        **on(("sm_100a",), any=Tile(many, 8, 1) if fp8 else Tile({"BH": 64, "BN": 32}, 8, 2)),
    }
    if sparse:
        # Addresses of rows far apart take registers.
        tiles = {**tiles, **on(("sm_90a",), any=Tile({"BH": 64, "BN": 32}, 8, 2))}
    if not fp8:
        small = {"BH": 16, "BN": 32}
        tiles = {**tiles, **on(("sm_80",), any=Tile(small, 4, 2)), **on(("gfx942",), any=Tile(small, 4, 1))}
    row = "(DV + 4*(DV // 128) + 2*DR)" if fp8 else "2*(DV + DR)"
    cases = SPARSE_CASES if sparse else SPLIT_CASES if not fp8 else tuple(c for c in SPLIT_CASES if not c.types)
    seen = "min(CONTEXT, TOP)" if sparse else "CONTEXT"
    return KernelSpec(
        name="mla_decode_split" + ("_fp8" if fp8 else "") + ("_sparse" if sparse else ""),
        function="attention:mla_decode_split",
        ops=("attn.mla_absorbed",),
        summary=f"Absorbed attention of a share of the {'chosen ' if sparse else ''}keys, paged "
        f"{'FP8' if fp8 else 'BF16'} latent cache",
        signature=split_signature(fp8, sparse),
        dims={**SPLIT_DIMS, **({"INDEX": 128, "TOP": 2048} if sparse else {})},
        constants=constants,
        tiles=tiles,
        grid=("B", "ceildiv(HEADS * QUERIES, BH)", "SPLITS"),
        build=build_split,
        reference=reference_split,
        cases=cases,
        flops=f"2*B*QUERIES*HEADS*{seen}*(2*DV + DR)",
        bytes=f"B*{seen}*{row} + 2*B*QUERIES*HEADS*(DV + DR) + 4*B*SPLITS*QUERIES*HEADS*(DV + 1)",
        aligned=DISTANCES,
        requires=("PAGE % BN == 0", "DV % 128 == 0", "DR % 16 == 0"),
        tensor_core=True,
        fallback="mla_decode_split" if fp8 else "",
    )  # fmt: skip


def build_combine(p: Problem) -> dict[str, Any]:
    """Random shares; one row has none with keys, another only its last."""
    partial = p.normal(p.B, p.SPLITS, p.ROWS, p.DV)
    lse = p.normal(p.B, p.SPLITS, p.ROWS, scale=4.0)
    lse[0, :, 0] = float("-inf")
    partial[0, :, 0] = 0.0
    lse[-1, :-1, -1] = float("-inf")
    return {
        "partial_ptr": partial, "lse_ptr": lse, "out_ptr": p.output("out_ptr", p.B, p.ROWS, p.DV), "splits": p.SPLITS,
        "ROWS": p.ROWS,
    }  # fmt: skip


def reference_combine(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    import torch

    weight = torch.softmax(x["lse_ptr"].double() * torch.log(torch.tensor(2.0)).double(), 1).nan_to_num()
    rounding = BF16_ROUNDING * 1.001 if x["out_ptr"].dtype == torch.bfloat16 else 0.0
    return {"out_ptr": Expected((weight[..., None] * x["partial_ptr"].double()).sum(1), rounding, 1e-6, 1e-5)}


def combine_constants(dims: Dims) -> dict[str, Constant]:
    return {"DV": dims["DV"], "DV2": power_of_two(dims["DV"])}


COMBINE = KernelSpec(
    name="mla_decode_combine",
    function="attention:mla_decode_combine",
    ops=("attn.mla_absorbed",),
    summary="Joins the shares of a split decode by their log-sum-exp",
    signature={"partial_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "splits": "i32", "ROWS": "i32"},
    dims={"B": 128, "ROWS": 128, "SPLITS": 2, "DV": 512},
    constants=combine_constants,
    tiles=on((*NVIDIA, "gfx942"), any=Tile({}, 4, 2)),
    grid=("B", "ROWS"),
    build=build_combine,
    reference=reference_combine,
    cases=(
        Case("three shares", {"B": 2, "ROWS": 5, "SPLITS": 3}),
        Case("one share, float32", {"B": 2, "ROWS": 3, "SPLITS": 1}, {"out_ptr": "*fp32"}),
        Case("width 80", {"B": 1, "ROWS": 3, "SPLITS": 2, "DV": 80}),
    ),
    flops="2*B*ROWS*SPLITS*DV",
    bytes="B*ROWS*(4*SPLITS*(DV + 1) + 2*DV)",
)


def build_read(p: Problem) -> dict[str, Any]:
    import torch

    lengths = sequence_lengths(p)
    pages = max(-(-n // p.PAGE) for n in lengths)
    cache, _ = decode_cache(p, (p.B * pages + 3) * p.PAGE)
    return {
        **cache, "pages_ptr": p.shuffled(p.B * pages + 3)[: p.B * pages].view(p.B, pages).to(torch.int32),
        "start_ptr": starts(lengths), "latent_out_ptr": p.output("latent_out_ptr", sum(lengths), p.DV),
        "rope_out_ptr": p.output("rope_out_ptr", sum(lengths), p.DR), "max_pages": pages,
    }  # fmt: skip


def reference_read(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    """Exact: a BF16 row as it stands, an FP8 row widened and rounded once."""
    import torch

    rows = [x["pages_ptr"][b].long() for b in range(p.B)]
    lengths = x["start_ptr"].diff().tolist()
    slot = torch.cat(
        [(r[:, None] * p.PAGE + torch.arange(p.PAGE)).flatten()[:n] for r, n in zip(rows, lengths, strict=True)]
    )
    latent = x["latent_ptr"][slot] if p.SCALE_ROW == 0 else wide(x["latent_ptr"], x["scale_ptr"])[slot]
    return {
        "latent_out_ptr": Expected(latent.to(x["latent_out_ptr"].dtype)),
        "rope_out_ptr": Expected(x["rope_ptr"][slot]),
    }


def read(fp8: bool) -> KernelSpec:
    def constants(dims: Dims) -> dict[str, Constant]:
        absent: dict[str, Constant] = {} if fp8 else {"scale_ptr": None}
        keep = {n: dims[n] for n in ("DV", "DR", "PAGE")}
        return {**absent, **keep, **cache_row(dims["DV"], dims["DR"], fp8, dims["INDEX"])}

    cache = {"latent_ptr": "*fp8e4nv", "rope_ptr": "*bf16", "scale_ptr": "*fp32"}
    if not fp8:
        cache = {"latent_ptr": "*bf16", "rope_ptr": "*bf16"}
    row = "DV + 4*(DV // 128) + 2*DR" if fp8 else "2*(DV + DR)"
    return KernelSpec(
        name="cache_read_fp8" if fp8 else "cache_read",
        function="attention:cache_read",
        ops=("cache.read",),
        summary=f"The cached prefix of every sequence in one piece, from the {'FP8' if fp8 else 'BF16'} cache",
        signature={
            **cache, "pages_ptr": "*i32", "start_ptr": "*i32", "latent_out_ptr": "*bf16", "rope_out_ptr": "*bf16",
            "max_pages": "i32",
        },
        dims={"B": 4, "DV": 512, "DR": 64, "PAGE": 64, "CONTEXT": 4096, "LOAD": -1, "INDEX": 0},
        constants=constants,
        tiles=on((*FP8, "gfx942") if fp8 else (*NVIDIA, "gfx942"), any=Tile({"BN": 8}, 4, 1)),
        grid=("ceildiv(CONTEXT, BN)", "B"),
        build=build_read,
        reference=reference_read,
        cases=(
            Case("lengths 70 and 300", {"B": 2, "CONTEXT": 300, "LOAD": 0}),
            Case("lengths 1 and 64", {"B": 2, "CONTEXT": 64, "LOAD": 1}),
            Case("lengths 4097 and 5", {"B": 2, "CONTEXT": 4097, "LOAD": 3}, slow=True),
        ),
        flops="0",
        bytes=f"B*CONTEXT*({row} + 2*(DV + DR))",
        requires=("PAGE % BN == 0", "DV % 128 == 0"),
        fallback="cache_read" if fp8 else "",
    )  # fmt: skip


SPECS = (decode_split(False), decode_split(True), decode_split(False, sparse=True), COMBINE, read(False), read(True))
