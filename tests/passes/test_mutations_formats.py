"""Deliberately wrong casts and packings: each is caught by the verifier, by a promise or by the numbers."""

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
    during,
    first,
    register,
    rule,
    set_attr,
)

import moec
from moec.ir import OPS, Module, WeightRef
from moec.ir.numeric import Quantised
from moec.ir.rewrite import append_to_program, replace_values, retype
from moec.ir.types import Quant
from moec.passes import casting, fp8_cast
from moec.passes.fp8_cast import Fp8Cast
from moec.passes.recipe import Element
from moec.passes.select_kernels import SelectKernels

MUTATIONS: Mutations = {}


def mutation(pass_name: str) -> Callable[[Mutation], Mutation]:
    return register(MUTATIONS, pass_name)


def stored(patch: Patch, weight: str, dtype: str, granularity: str, scale: str) -> None:
    """The first weight of a name ends up in another format, and its program says so."""

    def change(module: Module) -> None:
        found = next(w for n, w in module.weights.items() if n.endswith(weight))
        append_to_program(found, "weight.quantise", dtype=dtype, granularity=granularity, scale=scale)
        retype(module)

    after(patch, Fp8Cast, change)


@mutation("fp8-cast")
def scale_dropped_when_dequantising(patch: Patch) -> None:
    patch.setattr(Quantised, "dequantise", lambda self, dtype=torch.float32: self.data.to(dtype))


@mutation("fp8-cast")
def scale_inverted(patch: Patch) -> None:
    patch.setattr(
        Quantised, "dequantise", lambda s, dtype=torch.float32: s.data.to(dtype) / s.scale_per_element().to(dtype)
    )


@mutation("fp8-cast")
def scales_of_the_neighbouring_block(patch: Patch) -> None:
    evaluate = type(OPS["weight.quantise"]).evaluate

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        (made,) = evaluate(OPS["weight.quantise"], x, a, ctx)
        made.scale = made.scale * torch.linspace(0.5, 1.5, made.scale.shape[-1])
        return [made]

    rule(patch, "weight.quantise", wrong)


@mutation("fp8-cast")
def scale_rounded_after_quantising(patch: Patch) -> None:
    evaluate = type(OPS["weight.quantise"]).evaluate

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        (made,) = evaluate(OPS["weight.quantise"], x, a, ctx)
        made.scale = torch.exp2(torch.ceil(torch.log2(made.scale)))
        return [made]

    rule(patch, "weight.quantise", wrong)


@mutation("fp8-cast")
def gate_stored_in_fp4(patch: Patch) -> None:
    stored(patch, "mlp.gate", "fp4_e2m1", "1x32", "ue8m0")


@mutation("fp8-cast")
def gate_stored_in_fp8(patch: Patch) -> None:
    stored(patch, "mlp.gate", "fp8_e4m3", "128x128", "f32")


@mutation("fp8-cast")
def embedding_stored_in_fp4(patch: Patch) -> None:
    stored(patch, "embed", "fp4_e2m1", "1x32", "ue8m0")


@mutation("fp8-cast")
def experts_left_as_they_were(patch: Patch) -> None:
    """Nothing moves: what was promised did not happen."""
    cast = casting.cast
    patch.setattr(
        fp8_cast, "cast", lambda w, to, keep=False: "" if w.name.endswith("experts_down") else cast(w, to, keep)
    )


@mutation("fp8-cast")
def experts_in_fp4_of_another_recipe(patch: Patch) -> None:
    cast = casting.cast
    fp4 = Element("fp4_e2m1", Quant("ue8m0", (1, 32)))
    patch.setattr(
        fp8_cast, "cast", lambda w, to, keep=False: cast(w, fp4 if w.name.endswith("experts_down") else to, keep)
    )


@mutation("fp8-cast")
def norm_weights_left_out(patch: Patch) -> None:
    def change(module: Module) -> None:
        for function in module.functions.values():
            for op in [o for o in function.ops if o.name == "norm.rms"]:
                replace_values(function, {op.result: op.operands[0]})  # type: ignore[dict-item]
                function.ops.remove(op)

    after(patch, Fp8Cast, change)


@mutation("fp8-cast")
def scale_of_one_expert_doubled(patch: Patch) -> None:
    """Only tokens that reach the expert are wrong: most are not."""
    evaluate = type(OPS["moe.experts"]).evaluate

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        down = x[3].clone()
        down[5] *= 2
        return evaluate(OPS["moe.experts"], [*x[:3], down], a, ctx)

    during(patch, Fp8Cast, lambda: rule(patch, "moe.experts", wrong))


@mutation("fp8-cast")
def last_token_of_a_chunk_quantised_to_nothing(patch: Patch) -> None:
    evaluate = type(OPS["embed"]).evaluate

    def wrong(x: Sequence[Any], a: dict[str, Any], ctx: Any) -> list[Any]:
        (y,) = evaluate(OPS["embed"], x, a, ctx)
        y[-1] = 0
        return [y]

    during(patch, Fp8Cast, lambda: rule(patch, "embed", wrong))


@mutation("fp8-cast")
def group_limit_lost_with_the_types(patch: Patch) -> None:
    set_attr(patch, Fp8Cast, "moe.route", "top_groups", lambda g: 4)


@mutation("fp8-cast")
def fewer_experts_a_token(patch: Patch) -> None:
    def change(module: Module) -> None:
        for _, op in module.ops():
            if op.name == "moe.route":
                op.attrs["top_k"] = int(op.attrs["top_k"]) - 1  # type: ignore[arg-type]
        retype(module)

    after(patch, Fp8Cast, change)


@mutation("select-kernels")
def weight_of_another_shape(patch: Patch) -> None:
    def change(module: Module) -> None:
        _, op = first(module, "linear")
        ref = op.operands[1]
        assert isinstance(ref, WeightRef)
        op.operands[1] = next(o.operands[1] for _, o in module.ops() if o.name == "linear" and o.operands[1] != ref)

    after(patch, SelectKernels, change)


@mutation("select-kernels")
def packed_tiles_transposed(patch: Patch) -> None:
    from moec.ir.numeric import Packed

    logical = Packed.logical

    def wrong(self: Packed, dtype: torch.dtype) -> torch.Tensor:
        made = logical(self, dtype)
        return made.transpose(-1, -2) if made.shape[-1] == made.shape[-2] else made

    patch.setattr(Packed, "logical", wrong)


@mutation("select-kernels")
def bytes_of_a_lane_reversed(patch: Patch) -> None:
    from moec.ir.numeric import Packed

    data = Packed.data
    patch.setattr(Packed, "data", lambda self: data(self).flip(-1))


@mutation("select-kernels")
def rows_and_lanes_of_a_tile_exchanged(patch: Patch) -> None:
    from moec.ir.numeric import Packed

    data = Packed.data

    def wrong(self: Packed) -> torch.Tensor:
        made = data(self)
        return made.transpose(-3, -2).reshape(made.shape)

    patch.setattr(Packed, "data", wrong)


@mutation("select-kernels")
def scales_of_the_next_tile(patch: Patch) -> None:
    from moec.ir.numeric import Packed

    scales = Packed.scales

    def wrong(self: Packed) -> torch.Tensor | None:
        made = scales(self)
        return None if made is None else made.roll(1, -2)

    patch.setattr(Packed, "scales", wrong)


@mutation("select-kernels")
def types_not_updated(patch: Patch) -> None:
    patch.setattr("moec.passes.select_kernels.retype", lambda module: None)


@pytest.fixture(scope="module")
def traced() -> Any:
    return moec.trace("tiny-deepseek-v3", SMALL)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_pass_is_caught_and_named(name: str, traced: Any, monkeypatch: Patch) -> None:
    assert_caught(MUTATIONS, name, monkeypatch, lambda: traced.optimize("cpu", context=64, chunk=16, verify="numerics"))
