"""Declarations of the permutation of routed rows and its inverse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.recipe import BF16_ROUNDING, EVERYWHERE, FP8, hard_rows, power_of_two, quantise_1x128

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

FLOAT = {"x_ptr": "*fp32", "y_ptr": "*fp32"}


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


SPECS = (permutation(False), permutation(True), permute(True), permute(False), unpermute(False), unpermute(True))
