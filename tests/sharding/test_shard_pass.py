"""The shard pass: every rank's program together equals the unsharded one, and wrong programs are caught."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import moec
from moec.errors import MoecError
from moec.ir import CacheType, Module, Value, parse_module, print_module
from moec.ir.mesh import Mesh, part
from moec.ir.ops.collective import Dispatch
from moec.passes.base import Context, Limits, PassError
from moec.passes.numerics import Numerics, TooManyRanks
from moec.passes.planning.errors import CutBlock, WrongLayout
from moec.passes.planning.layout import Layout, LayoutRequest, resolve
from moec.passes.planning.precision import RECIPES
from moec.passes.shard import Shard
from moec.passes.sharding.memory import arena_shortage, memory_shortage
from moec.targets import load

SMALL = {"num_hidden_layers": "3", "first_k_dense_replace": "1"}
LAYOUTS = {
    "ep2": Layout(1, 2, 2, 16, 16),
    "ep3-redundant": Layout(1, 3, 3, 16, 18),
    "tp2": Layout(2, 1, 1, 16, 16),
    "tp2-ep2": Layout(2, 1, 2, 16, 16),
    "dp2-tp2-ep4": Layout(2, 2, 4, 16, 16),
    "two-expert-groups": Layout(1, 4, 2, 16, 16),
    "pp2": Layout(1, 1, 1, 16, 16, 2),
    "pp3-ep2": Layout(1, 2, 2, 16, 16, 3),
}


def sharded(layout: Layout, **options: str | int) -> tuple[Module, Numerics]:
    """The tiny model with three layers after the pass, and the numbers of the same model before it."""
    module = moec.trace("tiny-deepseek-v3", SMALL).ir
    before = Numerics(module, 1024)
    Shard(**options).run(module, Context(load("cpu"), Limits(), layout))  # type: ignore[arg-type]
    return module, before


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_together_equal_one(name: str) -> None:
    """In float64 to 1e-9, over several chunks, uneven shares of tokens and ranks without any."""
    module, before = sharded(LAYOUTS[name])
    assert before.check(module, 0.0) is None
    text = print_module(module)
    assert print_module(parse_module(text)) == text


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "weight-only"])
def test_recipes_over_stages_that_share_a_layer_function(recipe: str) -> None:
    """Dense layers stand in two stages of three: what is received has the recipe's type."""
    plan = moec.trace("tiny-deepseek-v3").optimize("cpu", recipe=recipe, layout=LayoutRequest(ranks=3, pp=3))
    received = [op for _, op in plan.ir.ops() if op.attrs.get("carries") == "activations"]
    assert len(received) == 4 and all(op.result.type.dtype == "f32" for op in received)  # type: ignore[union-attr]


def _lose_a_sum(module: Module) -> None:
    for function in module.functions.values():
        for op in [o for o in function.ops if o.name == "comm.all_reduce"][:1]:
            new, old = op.operands[0], op.result
            assert isinstance(new, Value)
            for user in function.ops:
                user.operands = [new if o is old else o for o in user.operands]
            function.ops.remove(op)


def _shift_experts(module: Module) -> None:
    """Weights take the placement's row of the layer behind."""
    module.attrs["placement"] = (tuple(range(16)), *[tuple((s + 1) % 16 for s in range(16))] * 2)
    for op in (o for w in module.weights.values() for o in w.program.ops if o.name == "weight.slot"):
        op.attrs["first"] = int(op.attrs["first"]) - 1  # type: ignore[arg-type]


def _wrong_part(module: Module) -> None:
    for weight in module.weights.values():
        for op in weight.program.ops:
            if op.name == "weight.shard" and op.attrs.get("parts") == 2:
                del op.attrs["parts"]


@pytest.mark.parametrize(
    ("layout", "damage"),
    [("tp2", _lose_a_sum), ("ep2", _shift_experts), ("tp2", _wrong_part)],
)
def test_wrong_programs_are_caught(layout: str, damage: Callable[[Module], None]) -> None:
    module, before = sharded(LAYOUTS[layout])
    damage(module)
    assert before.check(module, 0.0) is not None


@pytest.mark.parametrize("shares", [None, (0.7, 0.3)])
def test_placement_never_changes_results(shares: tuple[float, float] | None) -> None:
    """Any assignment of experts to slots, with copies of the same experts on several ranks, gives the same numbers."""
    module, before = sharded(Layout(1, 2, 2, 16, 20))
    rows = [[(s * 7 + 3) % 16 for s in range(16)] + [5, 5, 9, 0], [15 - s for s in range(16)] + [1, 2, 3, 4]]
    module.attrs["placement"] = tuple(map(tuple, rows))
    if shares is not None:
        module.attrs["replica_shares"] = tuple(
            tuple(shares[0] if row.index(e) == s else shares[1] for s, e in enumerate(row)) for row in rows
        )
    assert before.check(module, 0.0) is None


def test_too_many_ranks_for_numbers() -> None:
    module, before = sharded(Layout(1, 32, 16, 16, 16))
    with pytest.raises(TooManyRanks, match="--ranks 16"):
        before.check(module, 0.0)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (LayoutRequest(ranks=3, tp=2), WrongLayout, "try TP 1"),
        (LayoutRequest(ranks=3, pp=2), WrongLayout, "try PP 1"),
        (LayoutRequest(ranks=4, dp=4, tp=2), WrongLayout, "makes 8 ranks, not 4"),
        (LayoutRequest(ranks=4, ep=3), WrongLayout, "try EP 2"),
        (LayoutRequest(ranks=2, tp=2), CutBlock, "192 over 2 devices is 96, not a multiple of its 128-wide"),
    ],
)
def test_layouts_that_do_not_fit(request_: LayoutRequest, error: type[MoecError], words: str) -> None:
    module = moec.trace("tiny-deepseek-v3").ir
    with pytest.raises(error, match=words):
        resolve(module, load("cpu"), RECIPES["weight-only"], request_)


def test_widths_are_filled_up_on_request() -> None:
    """384 over two ranks cuts blocks of 128: refused with the sizes, or filled up to 512 with the same results."""
    with pytest.raises(CutBlock, match=r"384 over 2 devices is 192, .* --pad to fill it up to 512"):
        sharded(Layout(2, 1, 1, 16, 16, 1, 128))
    module, before = sharded(Layout(2, 1, 1, 16, 16, 1, 128, pad=True))
    assert before.check(module, 0.0) is None
    (pad,) = [o for o in module.weights["dense_layers.mlp.down"].program.ops if o.name == "weight.pad"]
    assert pad.attrs["size"] == 512


def test_a_mesh_that_does_not_fit_the_memory() -> None:
    """DeepSeek-V3 in BF16 on 8 devices of 80 GB is refused with the ranks that do; on as many it is not."""

    def shortage(ranks: int) -> str | None:
        module = moec.trace("deepseek-v3").ir
        context = Context(load("h800").with_ranks(ranks), Limits(8, 4096), Layout(1, ranks, ranks, 256, 256))
        Shard().run(module, context)
        found = memory_shortage(module, context)
        return str(found) if found else None

    line = r"a rank would hold .* of weights .* of cache, a device of h800 has 80 GB: use --ranks 32"
    assert re.match(line, shortage(8) or "")
    assert shortage(32) is None


def test_what_lies_between_kernels_counts_too() -> None:
    module, context = moec.trace("moonlight-16b").ir, Context(load("h800"), Limits(8, 4096))
    assert memory_shortage(module, context) is None and arena_shortage(module, context, 1 << 30) == ""
    assert "steps need 64.4 GB for what lies between kernels" in arena_shortage(module, context, 60 << 30)
    # Where weights and cache do not fit, that is said, and it is enough.
    assert arena_shortage(module, Context(load("h800"), Limits(8000, 4096)), 60 << 30) == ""


def test_placement_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    rows = [[*range(15, -1, -1), 4, 4], [*range(16), 7, 9]]
    file.write_text(json.dumps({"physical_to_logical_map": rows}))
    module, before = sharded(Layout(1, 2, 2, 16, 16), placement=str(file))
    assert module.attrs["placement"] == tuple(map(tuple, rows))
    assert before.check(module, 0.0) is None
    file.write_text(json.dumps({"physical_to_logical_map": rows[:1]}))
    with pytest.raises(PassError, match="has 1 layers, the model 2 with experts"):
        sharded(Layout(1, 2, 2, 16, 16), placement=str(file))


def test_more_stages_than_layers() -> None:
    with pytest.raises(PassError, match="PP 4 for 3 layers; choose at most PP 3"):
        sharded(Layout(1, 1, 1, 16, 16, 4))


def test_experts_that_cut_a_tensor_group() -> None:
    with pytest.raises(PassError, match="choose --ep 1 or a multiple of 4"):
        sharded(Layout(4, 1, 2, 16, 16))


def test_groups_of_a_mesh() -> None:
    mesh = Mesh(pp=2, dp=2, tp=2, ep=4)
    assert [mesh.group(5, axis) for axis in ("pp", "dp", "tp", "ep")] == [(1, 5), (5, 7), (4, 5), (4, 5, 6, 7)]
    for rank in range(mesh.ranks):
        for axis in ("pp", "dp", "tp", "ep"):
            assert mesh.group(rank, axis)[mesh.index(rank, axis)] == rank
    assert [part(7, 3, i) for i in range(3)] == [(0, 3), (3, 6), (6, 7)]
    assert [part(1, 3, i) for i in range(3)] == [(0, 1), (1, 1), (1, 1)]


def test_v3_sends_eight_rows_a_token_or_four_with_forwarding() -> None:
    """DeepSeek-V3 on 8 nodes of 8: 8 copies of a token without forwarding, at most 4 between nodes with it."""
    plans = {}
    for via in ("direct", "node"):
        module = moec.trace("deepseek-v3").ir
        Shard(via=via).run(module, Context(load("h800").with_ranks(64), Limits(), Layout(1, 64, 64, 256, 256)))
        (op,) = [o for o in module.functions["moe_layers.decode"].ops if o.name == "comm.dispatch"]
        types = [o.type for o in op.operands]
        sent = Dispatch().bytes_sent(types, [r.type for r in op.results], op.attrs)  # type: ignore[arg-type]
        row = 7168 * 2
        plans[via] = sent.bind({"T": 64}) / row / 64  # type: ignore[union-attr]
        if via == "node":
            assert op.attrs["node_limit"] == 4
    assert plans["direct"] == 8 * 63 / 64
    assert plans["node"] == 4 * 7 / 8 + 8 * 7 / 8


GROUPED = {
    "mixtral-8x7b": {"num_local_experts": "4"},
    "qwen3-30b-a3b": {"head_dim": "8", "num_experts": "8", "num_experts_per_tok": "2", "moe_intermediate_size": "16"},
    "gpt-oss-20b": {"head_dim": "8", "num_local_experts": "4", "num_experts_per_tok": "2"},
    # Layers in pairs, with a window and without, in one function.
    "gpt-oss-120b": {"head_dim": "8", "num_local_experts": "4", "num_experts_per_tok": "2", "num_hidden_layers": "4"},
    "llama-3.2-1b": {"head_dim": "8"},
}
GROUPED_SIZES = {
    "num_hidden_layers": "2", "hidden_size": "64", "num_attention_heads": "8", "num_key_value_heads": "2",
    "intermediate_size": "32", "vocab_size": "64",
}  # fmt: skip


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("model", GROUPED)
def test_grouped_heads_are_cut_or_shared(model: str, tp: int) -> None:
    """Two heads of keys and values: one a rank, or one for two ranks; sinks and biases follow their heads."""
    module = moec.trace(model, {**GROUPED_SIZES, **GROUPED[model]}).ir
    experts = int(GROUPED[model].get("num_local_experts", GROUPED[model].get("num_experts", 0)))
    before, ep = Numerics(module, 1024), tp if experts else 1
    outcome = Shard().run(module, Context(load("cpu"), Limits(), Layout(tp, 1, ep, experts, experts)))
    assert before.check(module, 0.0) is None
    heads = {op.attrs["kv_heads"] for _, op in module.ops() if op.name == "attn.heads"}
    assert heads == {1} and not any("attention is whole" in line for line in outcome.notes)
    args = [a.type for f in module.functions.values() for a in f.args]
    widths = {t.shape[-1] for t in args if isinstance(t, CacheType)}
    assert widths == {16}


def test_a_norm_over_all_heads_keeps_attention_whole() -> None:
    sizes = {**GROUPED_SIZES, "num_experts": "8", "num_experts_per_tok": "2"}
    module = moec.trace("olmoe-1b-7b", sizes).ir
    before = Numerics(module, 1024)
    outcome = Shard().run(module, Context(load("cpu"), Limits(), Layout(2, 1, 2, 8, 8)))
    assert before.check(module, 0.0) is None and any("attention is whole" in line for line in outcome.notes)


def test_heads_of_keys_that_do_not_fit_are_refused_with_a_proposal() -> None:
    sizes = {**GROUPED_SIZES, "head_dim": "8", "num_attention_heads": "12", "num_key_value_heads": "6"}
    with pytest.raises(WrongLayout, match=r"TP 4 neither divides 6 heads of keys and values .*; try TP 3"):
        moec.trace("llama-3.2-1b", sizes).optimize("cpu", layout=LayoutRequest(ranks=4, tp=4), recipe="fp32")
