"""Deliberately wrong variants of what lays a model over ranks and orders it: each is caught, and the pass named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from wrong_passes import (
    Mutation,
    Mutations,
    Patch,
    after,
    assert_caught,
    bypass,
    during,
    first,
    register,
    rule,
    set_attr,
)

import moec
from moec.ir import OPS, Function, Module, Op
from moec.ir.rewrite import clone_module, replace_values, retype
from moec.passes.base import Context, Limits, Pass
from moec.passes.manager import Manager, PassFailure
from moec.passes.overlap import Overlap
from moec.passes.place_experts import PlaceExperts
from moec.passes.planning.layout import Layout
from moec.passes.shard import Shard
from moec.passes.split_microbatches import SplitMicrobatches
from moec.passes.streams import split as splitting
from moec.targets import load

SMALL = {
    "num_hidden_layers": "6", "first_k_dense_replace": "1", "hidden_size": "64", "intermediate_size": "64",
    "moe_intermediate_size": "32", "vocab_size": "96",
}  # fmt: skip
TP2, EP2, TP2_EP2, PP2 = (
    Layout(2, 1, 1, 16, 16),
    Layout(1, 2, 2, 16, 16),
    Layout(2, 1, 2, 16, 16),
    Layout(1, 1, 1, 16, 16, 2),
)
LAYOUTS: dict[str, Layout] = {}
MUTATIONS: Mutations = {}


def mutation(pass_: type[Pass], layout: Layout = EP2) -> Callable[[Mutation], Mutation]:
    def add(function: Mutation) -> Mutation:
        LAYOUTS[function.__name__] = layout
        return register(MUTATIONS, pass_.name)(function)

    return add


@pytest.fixture(scope="module")
def traced() -> Module:
    return moec.trace("tiny-deepseek-v3", SMALL).ir


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers of 16 experts, of which one in each has most of the tokens."""
    array = np.full((5, 16), 100.0)
    array[np.arange(5), [5, 11, 2, 7, 0]] = 900.0
    path = tmp_path_factory.mktemp("loads") / "loads.npy"
    np.save(path, array)
    return path


def compile_on(traced: Module, layout: Layout, pass_name: str, loads: Path) -> Module:
    """The model over the ranks of a layout, by the passes up to the one meant, with numbers around that one."""
    module = clone_module(traced)
    context = Context(load("h800"), Limits(batch=64, context=64, chunk=16), layout)
    placed = [PlaceExperts(loads=str(loads), slots=10)] if pass_name == PlaceExperts.name else []
    steps = [*placed, Shard(), SplitMicrobatches(count="2"), Overlap(effort=0.05)]
    last = max(i for i, step in enumerate(steps) if step.name in (pass_name, Shard.name))
    Manager(context).run(module, steps[:last])
    return Manager(context, "numerics").run(module, steps[last : last + 1])


@mutation(Shard, TP2)
def sum_over_ranks_missing(patch: Patch) -> None:
    bypass(patch, Shard, "comm.all_reduce")


@mutation(Shard, TP2)
def sum_over_ranks_counts_the_residual_on_each(patch: Patch) -> None:
    def change(module: Module) -> None:
        function, reduce = first(module, "comm.all_reduce")
        add = next(o for o in function.ops if o.name == "add" and reduce.result in o.operands)
        replace_values(function, {reduce.result: reduce.operands[0]})  # type: ignore[dict-item]
        replace_values(function, {add.result: reduce.result})
        add.operands = [reduce.operands[0] if o is reduce.result else o for o in add.operands]
        reduce.operands = [add.result]
        function.ops.remove(reduce)
        function.ops.insert(function.ops.index(add) + 1, reduce)

    after(patch, Shard, change)


@mutation(Shard, TP2)
def every_rank_holds_the_first_part(patch: Patch) -> None:
    """Cut over an axis along which there is one rank."""

    def change(module: Module) -> None:
        for weight in module.weights.values():
            for op in weight.program.ops:
                if op.name == "weight.shard" and op.attrs["dim"] == 1:
                    op.attrs["axis"] = "dp"
        retype(module)

    after(patch, Shard, change)


@mutation(Shard, TP2)
def summed_width_of_the_other_rank(patch: Patch) -> None:
    evaluate = type(OPS["weight.shard"]).evaluate

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        (made,) = evaluate(OPS["weight.shard"], x, a, ctx)
        return [x[0].narrow(1, 0, made.shape[1]) if a["dim"] == 1 else made]

    during(patch, Shard, lambda: rule(patch, "weight.shard", wrong))


@mutation(Shard, TP2)
def gate_and_up_cut_as_one(patch: Patch) -> None:
    def change(module: Module) -> None:
        for op in (o for w in module.weights.values() for o in w.program.ops if o.name == "weight.shard"):
            op.attrs.pop("parts", None)

    after(patch, Shard, change)


@mutation(Shard, TP2)
def heads_not_divided(patch: Patch) -> None:
    def change(module: Module) -> None:
        op = first(module, "unflatten")[1]
        sizes: Any = op.attrs["sizes"]
        op.attrs["sizes"] = (sizes[0] * 2, sizes[1] // 2)
        retype(module)

    after(patch, Shard, change)


@mutation(Shard, TP2)
def vocabulary_gathered_in_another_order(patch: Patch) -> None:
    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        return [torch.cat(ctx.group(a["axis"]).exchange(x[0])[::-1], a["dim"])]

    during(patch, Shard, lambda: rule(patch, "comm.all_gather", wrong))


@mutation(Shard, TP2)
def collective_of_another_mesh(patch: Patch) -> None:
    set_attr(patch, Shard, "comm.all_reduce", "ranks", lambda n: 4)


@mutation(Shard, TP2_EP2)
def both_ranks_route_the_same_half(patch: Patch) -> None:
    """The rest of the tokens reaches no expert."""

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        group = ctx.group(a["axis"])
        half = -(-len(x[0]) // group.size)
        mine = len(x[0]) - half if group.index else half
        return [x[0][:mine]]

    during(patch, Shard, lambda: rule(patch, "comm.rows", wrong))


@mutation(Shard)
def expert_offset_of_one_slot(patch: Patch) -> None:
    evaluate = type(OPS["weight.slot"]).evaluate

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        each = a["slots"] // a["ranks"]
        return evaluate(OPS["weight.slot"], [x[0], (int(x[1]) + 1) % each], a, ctx)

    during(patch, Shard, lambda: rule(patch, "weight.slot", wrong))


@mutation(Shard)
def experts_of_the_other_rank(patch: Patch) -> None:
    def change(module: Module) -> None:
        for op in (o for w in module.weights.values() for o in w.program.ops if o.name == "weight.slot"):
            op.attrs["axis"] = "tp"
            op.attrs["ranks"] = 2

    after(patch, Shard, change)


@mutation(Shard)
def combined_without_the_routers_weights(patch: Patch) -> None:
    evaluate = type(OPS["comm.combine"]).evaluate

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        return evaluate(OPS["comm.combine"], [*x[:2], torch.full_like(x[2], 1 / x[2].shape[1])], a, ctx)

    during(patch, Shard, lambda: rule(patch, "comm.combine", wrong))


@mutation(Shard)
def rows_of_another_experts(patch: Patch) -> None:
    """What the exchange delivers is taken in another order than it is counted in."""
    evaluate = type(OPS["comm.dispatch"]).evaluate

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        rows, *rest = evaluate(OPS["comm.dispatch"], x, a, ctx)
        return [rows.flip(0), *rest]

    during(patch, Shard, lambda: rule(patch, "comm.dispatch", wrong))


@mutation(Shard, PP2)
def stage_begins_one_layer_late(patch: Patch) -> None:
    def change(module: Module) -> None:
        repeats = [o for _, o in module.ops() if o.name == "repeat" and o.attrs["last"] == 5]
        for op in repeats:
            op.attrs["first"] = int(op.attrs["first"]) + 1  # type: ignore[arg-type]

    after(patch, Shard, change)


@mutation(PlaceExperts)
def an_expert_without_a_slot(patch: Patch) -> None:
    def change(module: Module) -> None:
        rows = module.attrs["placement"]
        assert isinstance(rows, tuple)
        module.attrs["placement"] = tuple(tuple(4 if e == 3 else e for e in row) for row in rows)  # type: ignore[union-attr]

    after(patch, PlaceExperts, change)


@mutation(PlaceExperts)
def rows_of_uneven_length(patch: Patch) -> None:
    def change(module: Module) -> None:
        rows: Any = module.attrs["placement"]
        module.attrs["placement"] = (rows[0][:-1], *rows[1:])

    after(patch, PlaceExperts, change)


@mutation(PlaceExperts)
def shares_of_a_replica_lost(patch: Patch) -> None:
    def change(module: Module) -> None:
        rows = module.attrs["placement"]
        assert isinstance(rows, tuple)
        module.attrs["replica_shares"] = tuple(tuple(0.25 for _ in row) for row in rows)  # type: ignore[union-attr]

    after(patch, PlaceExperts, change)


def _shift_slots(module: Module) -> None:
    for op in (o for w in module.weights.values() for o in w.program.ops if o.name == "weight.slot"):
        op.attrs["first"] = int(op.attrs["first"]) - 1  # type: ignore[arg-type]


def _shift_dispatch(module: Module) -> None:
    for _, op in module.ops():
        if op.name == "comm.dispatch":
            op.attrs["first"] = int(op.attrs["first"]) - 1  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [_shift_slots, _shift_dispatch])
def test_a_shifted_map_of_replicas_is_caught(
    shift: Callable[[Module], None], traced: Module, loads: Path, monkeypatch: Patch
) -> None:
    """Weights and tokens must look at the same row of the placement; it is `shard` that reads it."""
    after(monkeypatch, Shard, shift)
    with pytest.raises(PassFailure, match=r"^after pass shard: "):
        compile_on(traced, EP2, PlaceExperts.name, loads)


def _argument(function: Function, name: str) -> Any:
    return next(a for a in function.args if a.name == name)


def _of_the_other_part(name: str) -> Callable[[Module], None]:
    """Ops of part 1 of a layer function take an argument of part 0."""

    def change(module: Module) -> None:
        function = first(module, "moe.route", "decode")[0]
        ours, other = _argument(function, f"{name}_1"), _argument(function, f"{name}_0")
        for op in function.ops:
            op.operands = [other if o is ours else o for o in op.operands]

    return change


@mutation(SplitMicrobatches)
def positions_of_the_other_part(patch: Patch) -> None:
    after(patch, SplitMicrobatches, _of_the_other_part("pos"))


@mutation(SplitMicrobatches)
def pages_of_the_other_part(patch: Patch) -> None:
    after(patch, SplitMicrobatches, _of_the_other_part("pages"))


@mutation(SplitMicrobatches)
def results_of_the_parts_exchanged(patch: Patch) -> None:
    after(patch, SplitMicrobatches, lambda m: m.functions["decode"].returns.reverse())


@mutation(SplitMicrobatches)
def a_part_left_out_of_a_layer(patch: Patch) -> None:
    """Its residual stream passes by."""

    def change(module: Module) -> None:
        function = first(module, "moe.route", "prefill")[0]
        function.returns[1] = function.args[2]

    after(patch, SplitMicrobatches, change)


@mutation(SplitMicrobatches)
def symbol_of_the_whole_batch_kept(patch: Patch) -> None:
    patch.setattr(splitting, "_attribute", lambda value, k, own: value)


@mutation(SplitMicrobatches)
def ops_of_the_parts_taken_from_one(patch: Patch) -> None:
    """Both parts share the routing of the first."""

    def change(module: Module) -> None:
        function = first(module, "moe.route", "decode")[0]
        routes = [o for o in function.ops if o.name == "moe.route"]
        replace_values(function, dict(zip(routes[1].results, routes[0].results, strict=True)))

    after(patch, SplitMicrobatches, change)


def _remove(op_name: str, where: str = "decode") -> Callable[[Module], None]:
    def change(module: Module) -> None:
        function, op = first(module, op_name, where)
        function.ops.remove(op)

    return change


def _kernel(module: Module) -> Function:
    return next(f for f in module.functions.values() if f.name.endswith(".round") and "decode" in f.name)


@mutation(Overlap)
def wait_missing(patch: Patch) -> None:
    after(patch, Overlap, _remove("event.wait"))


@mutation(Overlap)
def signal_missing(patch: Patch) -> None:
    after(patch, Overlap, _remove("event.record"))


@mutation(Overlap)
def exchange_on_the_stream_of_products(patch: Patch) -> None:
    """Its users then wait for another stream than it runs on."""
    set_attr(patch, Overlap, "comm.combine", "stream", lambda s: "elsewhere", "decode")


@mutation(Overlap)
def two_results_in_one_buffer(patch: Patch) -> None:
    def change(module: Module) -> None:
        for function in module.functions.values():
            for op in function.ops:
                if "buffers" in op.attrs:
                    op.attrs["buffers"] = tuple(-1 if b == -1 else 0 for b in op.attrs["buffers"])  # type: ignore[union-attr]

    after(patch, Overlap, change)


@mutation(Overlap)
def last_round_left_out(patch: Patch) -> None:
    def change(module: Module) -> None:
        kernel = _kernel(module)
        op = next(o for _, o in module.ops() if o.name == "repeat" and o.attrs["func"] == kernel.name)
        op.attrs["last"] = int(op.attrs["last"]) - 1  # type: ignore[arg-type]

    after(patch, Overlap, change)


@mutation(Overlap)
def pipeline_emptied_at_another_layer(patch: Patch) -> None:
    def change(module: Module) -> None:
        calls = [o for o in module.functions["decode"].ops if o.name == "call"]
        calls[-1].attrs["layer"] = int(calls[-1].attrs["layer"]) - 1  # type: ignore[arg-type]

    after(patch, Overlap, change)


@mutation(Overlap)
def weights_of_the_layer_ahead(patch: Patch) -> None:
    """An op of a later stage takes the weights of the layer that the first stage works on."""

    def change(module: Module) -> None:
        for op in _kernel(module).ops:
            if op.name == "index.affine":
                op.attrs["offset"] = 0

    after(patch, Overlap, change)


@mutation(Overlap)
def a_carried_value_is_never_renewed(patch: Patch) -> None:
    def change(module: Module) -> None:
        kernel = _kernel(module)
        kernel.returns[0] = kernel.args[1]

    after(patch, Overlap, change)


@mutation(Overlap)
def op_before_its_operand(patch: Patch) -> None:
    def change(module: Module) -> None:
        ops = _kernel(module).ops
        op: Op = next(o for o in ops if o.name == "moe.experts")
        ops.remove(op)
        ops.insert(0, op)

    after(patch, Overlap, change)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_pass_is_caught_and_named(name: str, traced: Module, loads: Path, monkeypatch: Patch) -> None:
    layout, pass_name = LAYOUTS[name], MUTATIONS[name][0]
    assert_caught(MUTATIONS, name, monkeypatch, lambda: compile_on(traced, layout, pass_name, loads))


@pytest.mark.parametrize(
    ("layout", "pass_"),
    [(TP2, Shard), (TP2_EP2, Shard), (PP2, Shard), (EP2, PlaceExperts), (EP2, SplitMicrobatches), (EP2, Overlap)],
)
def test_the_shipped_passes_are_right(layout: Layout, pass_: type[Pass], traced: Module, loads: Path) -> None:
    compile_on(traced, layout, pass_.name, loads)
