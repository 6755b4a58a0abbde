"""Deliberately wrong passes and op rules: each must be caught by the verifier or by the numbers, and the pass named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from wrong_passes import (
    SMALL,
    Mutation,
    Mutations,
    Patch,
    after,
    assert_caught,
    bypass,
    first,
    program,
    register,
    rule,
    set_attr,
    swap,
)

import moec
from moec.ir import OPS, Module, rewrite
from moec.ir.numeric import Quantised
from moec.ir.ops.norms import rms
from moec.ir.rewrite import replace_values, retype
from moec.passes import fuse, mla_absorb
from moec.passes.bind_limits import BindLimits
from moec.passes.canonicalise import Canonicalise
from moec.passes.fuse import Fuse
from moec.passes.manager import PassFailure
from moec.passes.mla_absorb import MlaAbsorb

MUTATIONS: Mutations = {}


def mutation(pass_name: str) -> Callable[[Mutation], Mutation]:
    return register(MUTATIONS, pass_name)


@mutation("mla-absorb")
def softmax_scale_dropped(patch: Patch) -> None:
    set_attr(patch, MlaAbsorb, "attn.mla_absorbed", "scale", lambda s: 1.0)


@mutation("mla-absorb")
def softmax_scale_of_another_width(patch: Patch) -> None:
    set_attr(patch, MlaAbsorb, "attn.mla_absorbed", "scale", lambda s: s * 1.01)


@mutation("mla-absorb")
def nope_and_rope_swapped(patch: Patch) -> None:
    def change(module: Module) -> None:
        function, absorbed = first(module, "attn.mla_absorbed")
        split = function.producer()[absorbed.operands[1]]  # type: ignore[index]
        split.attrs["sizes"] = split.attrs["sizes"][::-1]  # type: ignore[index]
        retype(module)

    after(patch, MlaAbsorb, change)


@mutation("mla-absorb")
def value_slice_begins_at_zero(patch: Patch) -> None:
    program(patch, MlaAbsorb, "kv_b.v", "weight.slice", lambda o: o.attrs.update(start=0, stop=32))


@mutation("mla-absorb")
def key_slice_one_row_off(patch: Patch) -> None:
    program(patch, MlaAbsorb, "kv_b.k", "weight.slice", lambda o: o.attrs.update(start=1, stop=33))


@mutation("mla-absorb")
def key_slice_too_short(patch: Patch) -> None:
    program(patch, MlaAbsorb, "kv_b.k", "weight.slice", lambda o: o.attrs.update(stop=31))


@mutation("mla-absorb")
def key_transpose_missing(patch: Patch) -> None:
    program(patch, MlaAbsorb, "kv_b.k", "weight.transpose", lambda o: o.attrs.update(perm=(0, 1, 2)))


@mutation("mla-absorb")
def heads_and_rows_exchanged(patch: Patch) -> None:
    program(patch, MlaAbsorb, "kv_b.v", "weight.reshape", lambda o: o.attrs.update(shape=(8, 32, 128)))


@mutation("mla-absorb")
def up_projections_exchanged(patch: Patch) -> None:
    split = mla_absorb._split_up_projection
    patch.setattr(mla_absorb, "_split_up_projection", lambda *a: split(*a)[::-1])


@mutation("mla-absorb")
def cache_written_after_it_is_read(patch: Patch) -> None:
    def change(module: Module) -> None:
        function, append = first(module, "cache.append", "decode")
        function.ops.remove(append)
        function.ops.append(append)

    after(patch, MlaAbsorb, change)


@mutation("mla-absorb")
def weights_of_another_layer(patch: Patch) -> None:
    def change(module: Module) -> None:
        program_ = next(w for n, w in module.weights.items() if n.endswith("kv_b.v")).program
        program_.ops[0].attrs["tensor"] = str(program_.ops[0].attrs["tensor"]).replace("{l}", "0")

    after(patch, MlaAbsorb, change)


@mutation("mla-absorb")
def result_of_attention_unprojected(patch: Patch) -> None:
    bypass(patch, MlaAbsorb, "linear.heads")


@mutation("mla-absorb")
def absorbed_rule_sees_one_position_less(patch: Patch) -> None:
    evaluate = type(OPS["attn.mla_absorbed"]).evaluate

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        return evaluate(OPS["attn.mla_absorbed"], [*x[:5], (x[5] - 1).clamp_min(0), x[6]], a, ctx)

    rule(patch, "attn.mla_absorbed", wrong)


@mutation("mla-absorb")
def absorbed_rule_reads_the_pages_of_sequence_zero(patch: Patch) -> None:
    evaluate = type(OPS["attn.mla_absorbed"]).evaluate

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        return evaluate(OPS["attn.mla_absorbed"], [*x[:4], x[4] * 0, *x[5:]], a, ctx)

    rule(patch, "attn.mla_absorbed", wrong)


@mutation("mla-absorb")
def head_rule_mixes_heads(patch: Patch) -> None:
    rule(patch, "linear.heads", lambda x, a, ctx: [torch.einsum("thk,hnk->thn", x[0], x[1].roll(1, 0))])


@mutation("mla-absorb")
def slice_rule_one_off(patch: Patch) -> None:
    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        return [x[0].roll(1, a["axis"]).narrow(a["axis"], a["start"], a["stop"] - a["start"])]

    rule(patch, "weight.slice", wrong)


@mutation("mla-absorb")
def transpose_rule_only_reshapes(patch: Patch) -> None:
    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        return [x[0].reshape([x[0].shape[p] for p in a["perm"]])]

    rule(patch, "weight.transpose", wrong)


@mutation("fuse")
def residual_dropped_by_the_fused_norm(patch: Patch) -> None:
    rule(patch, "norm.add_rms", lambda x, a, ctx: [x[1], rms(x[1], x[2], a["eps"])])


@mutation("fuse")
def sum_and_norm_exchanged(patch: Patch) -> None:
    rule(patch, "norm.add_rms", lambda x, a, ctx: [rms(x[0] + x[1], x[2], a["eps"]), x[0] + x[1]])


@mutation("fuse")
def eps_of_the_fused_norm(patch: Patch) -> None:
    set_attr(patch, Fuse, "norm.add_rms", "eps", lambda e: e * 100)


@mutation("fuse")
def norm_weight_of_another_norm(patch: Patch) -> None:
    def change(module: Module) -> None:
        function, norm = first(module, "norm.add_rms")
        other = next(o for o in function.ops if o.name == "norm.rms" and o.operands[0] is function.args[1])
        norm.operands[2] = other.operands[1]

    after(patch, Fuse, change)


@mutation("fuse")
def joined_in_another_order(patch: Patch) -> None:
    join = rewrite.join_weights
    patch.setattr(fuse, "join_weights", lambda name, parts, axis: join(name, parts[::-1], axis))


@mutation("fuse")
def concat_rule_reversed(patch: Patch) -> None:
    evaluate = type(OPS["weight.concat"]).evaluate

    def quantised(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        plain = isinstance(x[0], torch.Tensor)
        return evaluate(OPS["weight.concat"], x, a, ctx) if plain else evaluate(OPS["weight.concat"], x[::-1], a, ctx)

    rule(patch, "weight.concat", quantised)


@mutation("fuse")
def scales_of_joined_parts_not_repeated(patch: Patch) -> None:
    evaluate = type(OPS["weight.concat"]).evaluate

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        (made,) = evaluate(OPS["weight.concat"], x, a, ctx)
        if isinstance(made, Quantised):
            made.scale = made.scale[:1].expand_as(made.scale)
        return [made]

    rule(patch, "weight.concat", wrong)


@mutation("fuse")
def parts_split_at_the_wrong_place(patch: Patch) -> None:
    def change(module: Module) -> None:
        split = next(o for _, o in module.ops() if o.name == "split" and o.loc and "fuse" in o.loc.passes)
        split.attrs["sizes"] = split.attrs["sizes"][::-1]  # type: ignore[index]
        retype(module)

    after(patch, Fuse, change)


@mutation("canonicalise")
def equal_attributes_are_not_compared(patch: Patch) -> None:
    def change(module: Module) -> None:
        function, _ = first(module, "rope")
        ropes = [o for o in function.ops if o.name == "norm.rms"]
        ropes[0].operands[1], ropes[-1].operands[1] = ropes[-1].operands[1], ropes[0].operands[1]

    after(patch, Canonicalise, change)


@mutation("canonicalise")
def router_bias_removed(patch: Patch) -> None:
    after(patch, Canonicalise, lambda m: first(m, "moe.route")[1].operands.__delitem__(2))


@mutation("canonicalise")
def group_limit_removed(patch: Patch) -> None:
    set_attr(patch, Canonicalise, "moe.route", "top_groups", lambda g: 4)


@mutation("canonicalise")
def groups_scored_by_their_best(patch: Patch) -> None:
    set_attr(patch, Canonicalise, "moe.route", "group_score", lambda g: "max")


@mutation("canonicalise")
def routed_weights_not_normalised(patch: Patch) -> None:
    set_attr(patch, Canonicalise, "moe.route", "normalise", lambda n: False)


@mutation("canonicalise")
def routed_scaling_dropped(patch: Patch) -> None:
    set_attr(patch, Canonicalise, "moe.route", "scale", lambda s: 1.0)


@mutation("canonicalise")
def shared_expert_removed(patch: Patch) -> None:
    def change(module: Module) -> None:
        function, combine = first(module, "moe.combine")
        users = [o for o in function.ops if o.name == "add" and combine.result in o.operands]
        replace_values(function, {users[0].result: combine.result})

    after(patch, Canonicalise, change)


@mutation("canonicalise")
def residual_dropped(patch: Patch) -> None:
    bypass(patch, Canonicalise, "add", keep=1)


@mutation("canonicalise")
def rope_pairs_of_the_other_convention(patch: Patch) -> None:
    set_attr(patch, Canonicalise, "rope", "interleaved", lambda i: not i)


@mutation("canonicalise")
def rope_offset(patch: Patch) -> None:
    set_attr(patch, Canonicalise, "rope", "offset", lambda o: o - 2)


@mutation("canonicalise")
def positions_and_sequences_exchanged(patch: Patch) -> None:
    swap(patch, Canonicalise, "cache.append", 4, 5)


@mutation("canonicalise")
def last_layer_left_out(patch: Patch) -> None:
    set_attr(patch, Canonicalise, "repeat", "last", lambda n: n - 1)


@mutation("canonicalise")
def gate_and_up_exchanged(patch: Patch) -> None:
    def change(module: Module) -> None:
        weight = next(w for n, w in module.weights.items() if n.endswith("experts_gate_up"))
        concat = next(o for o in weight.program.ops if o.name == "weight.concat")
        concat.operands.reverse()

    after(patch, Canonicalise, change)


@mutation("canonicalise")
def logits_of_other_rows(patch: Patch) -> None:
    bypass(patch, Canonicalise, "norm.rms", where="decode")


@mutation("canonicalise")
def value_used_before_its_definition(patch: Patch) -> None:
    after(patch, Canonicalise, lambda m: first(m, "rope")[0].ops.reverse())


@mutation("bind-limits")
def rotary_base(patch: Patch) -> None:
    program(patch, BindLimits, "rope_table", "weight.rope_table", lambda o: o.attrs.update(theta=5000.0))


@mutation("bind-limits")
def rotary_dims(patch: Patch) -> None:
    program(patch, BindLimits, "rope_table", "weight.rope_table", lambda o: o.attrs.update(dims=8))


@mutation("bind-limits")
def attention_factor(patch: Patch) -> None:
    program(patch, BindLimits, "rope_table", "weight.rope_table", lambda o: o.attrs.update(attention=1.1))


@pytest.fixture(scope="module")
def traced() -> Any:
    return moec.trace("tiny-deepseek-v3", SMALL)


def test_the_shipped_passes_are_right(traced: Any) -> None:
    """Every preset's pipeline keeps its numbers, or the mutations below would prove nothing."""
    for recipe in ("auto", "fp32"):
        traced.optimize("cpu", context=64, chunk=16, recipe=recipe, verify="numerics")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_pass_is_caught_and_named(name: str, traced: Any, monkeypatch: Patch) -> None:
    assert_caught(MUTATIONS, name, monkeypatch, lambda: traced.optimize("cpu", context=64, chunk=16, verify="numerics"))


def test_the_first_op_that_departs_is_named(traced: Any, monkeypatch: Patch) -> None:
    """By function, call, distance, text and location chain."""
    MUTATIONS["softmax_scale_dropped"][1](monkeypatch)
    with pytest.raises(PassFailure) as caught:
        traced.optimize(
            "cpu",
            context=64,
            chunk=16,
            verify="numerics",
            passes=["mla-absorb{prefill=absorbed,decode=absorbed}"],
        )
    message = str(caught.value)
    assert "first in @dense_layers.prefill, call 1, by " in message
    assert "linear.heads" in message
    assert ", mla-absorb)" in message
    assert message.endswith("(tolerance 1e-05)")


def test_a_model_too_large_is_refused_in_one_line() -> None:
    from moec.passes.numerics import TooLarge

    with pytest.raises(TooLarge, match="--set num_hidden_layers=2") as caught:
        moec.trace("deepseek-v2-lite").optimize("cpu", verify="numerics")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_one_phase_alone_keeps_its_numbers(phase: str, traced: Any) -> None:
    """What only the other phase needs is gone before the first pass, not lost by it."""
    plan = traced.optimize("cpu", context=64, chunk=16, phase=phase, verify="numerics")
    assert {f.name.rpartition(".")[2] for f in plan.ir.functions.values()} == {phase}
