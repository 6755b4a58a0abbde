"""Declarations of the kernels around an all-to-all: slots of pairs, order of what arrives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, Constant, Dims, KernelSpec, Tile, on
from moec.codegen.triton.specs.recipe import EVERYWHERE, power_of_two

if TYPE_CHECKING:
    from moec.ir.replicas import Replicas


def replicas(p: Problem) -> Replicas:
    """Copies of the first experts, with uneven shares by UNEVEN, in slots that are shuffled."""
    import numpy as np

    from moec.ir.replicas import Replicas

    draw = np.random.default_rng(p.SLOTS)
    held = draw.permutation([s % p.E for s in range(p.SLOTS)]).tolist()
    shares = tuple(draw.uniform(0, 1, p.SLOTS).tolist()) if p.UNEVEN else None
    return Replicas(tuple(held), p.E, shares)


def build_choose(p: Problem) -> dict[str, Any]:
    import torch

    if p.UNEVEN:
        # A popular expert, so that its copies share many pairs.
        chosen = torch.where(p.uniform(p.T, p.TOP_K) < 0.5, 1, p.integers(0, p.E, p.T, p.TOP_K)).to(torch.int32)
    else:
        chosen = torch.stack([p.shuffled(p.E)[: p.TOP_K] for _ in range(p.T)]).to(torch.int32)
    if p.instance.dims.get("ONE_EXPERT"):
        chosen = torch.ones_like(chosen)
    return {
        "index_ptr": chosen, "table_ptr": torch.from_numpy(replicas(p).table()),
        "live_ptr": torch.tensor([p.LIVE], dtype=torch.int32), "slot_ptr": p.output("slot_ptr", p.T, p.TOP_K),
        "count_ptr": torch.zeros(p.SLOTS, dtype=torch.int32), "PAIRS": p.T * p.TOP_K, "source": 3,
    }  # fmt: skip


def reference_choose(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    """The rule in float64, as ranks on CPUs apply it."""
    import torch

    slot = torch.full((p.T, p.TOP_K), -1, dtype=torch.long)
    slot[: p.LIVE] = torch.from_numpy(replicas(p).choose(x["index_ptr"][: p.LIVE].numpy(), x["source"]))
    counted = torch.bincount(slot[slot >= 0], minlength=p.SLOTS)
    return {"slot_ptr": Expected(slot), "count_ptr": Expected(counted)}


def choose_constants(d: Dims) -> dict[str, Constant]:
    return {"E": d["E"], "SLOTS": d["SLOTS"], "TOP_K": d["TOP_K"]}


CHOOSE = KernelSpec(
    name="choose_slots",
    function="exchange:choose_slots",
    ops=("comm.dispatch",),
    summary="The copy of its expert that every pair goes to, and the pairs of every slot",
    signature={
        "index_ptr": "*i32", "table_ptr": "*i32", "live_ptr": "*i32", "slot_ptr": "*i32", "count_ptr": "*i32",
        "PAIRS": "i32", "source": "i32",
    },
    dims={"T": 128, "TOP_K": 8, "E": 256, "SLOTS": 288, "LIVE": 128, "UNEVEN": 0},
    constants=choose_constants,
    tiles=on(EVERYWHERE, any=Tile({"BLOCK": 512}, 4, 1)),
    grid=("E",),
    build=build_choose,
    reference=reference_choose,
    cases=(
        Case("copies, 90 of 100 tokens", {"T": 100, "E": 16, "SLOTS": 24, "TOP_K": 4, "LIVE": 90}),
        Case("uneven shares", {"T": 200, "E": 6, "SLOTS": 12, "TOP_K": 3, "LIVE": 200, "UNEVEN": 1}),
        Case("no token", {"T": 2, "E": 8, "SLOTS": 8, "TOP_K": 2, "LIVE": 0}),
        Case("one token", {"T": 1, "E": 8, "SLOTS": 9, "TOP_K": 2, "LIVE": 1}),
        Case("all to one expert", {"T": 30, "E": 4, "SLOTS": 4, "TOP_K": 1, "LIVE": 30, "ONE_EXPERT": 1}),
    ),
    flops="0",
    bytes="12*T*TOP_K + 4*(E + 3*SLOTS)",
)  # fmt: skip


def counts(p: Problem) -> Any:
    """Rows from every rank for every slot; SKEW 1: all for one slot, 2: one rank sends nothing, 3: there is one row."""
    import torch

    found = p.integers(0, p.MOST + 1, p.RANKS, p.LOCAL)
    if p.SKEW == 1:
        found[:, : p.LOCAL - 1] = 0
    if p.SKEW == 2:
        found[0] = 0
        found[:, 0] = 0
    if p.SKEW == 3:
        found[:] = 0
        found[-1, -1] = 1
    return found.to(torch.int32)


def build_sort(p: Problem) -> dict[str, Any]:
    count = counts(p)
    arrived = int(count.sum())
    rows = -(-(arrived + min(p.LOCAL, arrived) * (p.ALIGN - 1)) // p.ALIGN) * p.ALIGN
    return {
        "count_ptr": count, "source_ptr": p.output("source_ptr", rows), "place_ptr": p.output("place_ptr", arrived),
        "block_expert_ptr": p.output("block_expert_ptr", rows // p.ALIGN), "ROWS": rows,
    }  # fmt: skip


def reference_sort(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    """By a stable sort of the arrived rows' slots."""
    import torch

    count = x["count_ptr"].long()
    slot = torch.arange(p.LOCAL).repeat(p.RANKS).repeat_interleave(count.flatten())
    source = torch.full((x["ROWS"],), -1)
    place = torch.full((len(slot),), -1)
    blocks = torch.full((x["ROWS"] // p.ALIGN,), -1)
    row = 0
    for s in range(p.LOCAL):
        mine = (slot == s).nonzero().flatten()
        source[row : row + len(mine)] = mine
        place[mine] = torch.arange(len(mine)) + row
        following = row + -(-len(mine) // p.ALIGN) * p.ALIGN
        blocks[row // p.ALIGN : following // p.ALIGN] = s
        row = following
    return {"source_ptr": Expected(source), "place_ptr": Expected(place), "block_expert_ptr": Expected(blocks)}


def sort_constants(d: Dims) -> dict[str, Constant]:
    sizes = {"RANKS": d["RANKS"], "LOCAL": d["LOCAL"], "ALIGN": d["ALIGN"]}
    return {**sizes, "RANKS2": power_of_two(d["RANKS"]), "LOCAL2": power_of_two(d["LOCAL"])}


SORT = KernelSpec(
    name="sort_arrived",
    function="exchange:sort_arrived",
    ops=("comm.dispatch",),
    summary="Rows that came from all ranks, by the slot that they are for",
    signature={
        "count_ptr": "*i32", "source_ptr": "*i32", "place_ptr": "*i32", "block_expert_ptr": "*i32", "ROWS": "i32",
    },
    dims={"RANKS": 144, "LOCAL": 2, "ALIGN": 64, "MOST": 7, "SKEW": 0},
    constants=sort_constants,
    tiles=on(EVERYWHERE, any=Tile({"BLOCK": 128}, 4, 1)),
    grid=("LOCAL",),
    build=build_sort,
    reference=reference_sort,
    cases=(
        Case("one row", {"RANKS": 3, "LOCAL": 5, "ALIGN": 16, "MOST": 40, "SKEW": 3}),
        Case("3 ranks, 5 slots", {"RANKS": 3, "LOCAL": 5, "ALIGN": 16, "MOST": 40}),
        Case("all to one slot", {"RANKS": 4, "LOCAL": 3, "ALIGN": 64, "MOST": 200, "SKEW": 1}),
        Case("a rank and a slot without rows", {"RANKS": 2, "LOCAL": 4, "ALIGN": 64, "SKEW": 2}),
        Case("no row", {"RANKS": 2, "LOCAL": 2, "ALIGN": 64, "MOST": 0}),
        Case("one slot of 9 ranks", {"RANKS": 9, "LOCAL": 1, "ALIGN": 16}),
    ),
    flops="0",
    bytes="4*RANKS*LOCAL*(1 + 2*MOST)",
)  # fmt: skip

SPECS = (CHOOSE, SORT)
