"""Predicted times of ops follow the types that the module states, its mesh and its micro-batches."""

from __future__ import annotations

from typing import Any

import pytest

import moec
from moec.ir.cost import op_cost, phase_sizes
from moec.passes.op_times import op_times, step_us
from moec.passes.planning import LayoutRequest

WIDE = {"hidden_size": "2048", "num_hidden_layers": "4", "intermediate_size": "8192", "vocab_size": "4096"}


def plan(recipe: str, target: str = "h100", phase: str = "prefill", **layout: Any) -> Any:
    return moec.trace("tiny-deepseek-v3", WIDE).optimize(
        target, phase=phase, batch=64, context=1024, chunk=8192, recipe=recipe, layout=LayoutRequest(**layout)
    )


def products_us(recipe: str, phase: str = "prefill") -> float:
    made = plan(recipe, phase=phase)
    return sum(t.step_us for t in op_times(made.ir, made.context) if t.op.name == "linear")


def test_products_cost_what_their_types_say() -> None:
    """Many tokens, an H100: FP32 has no tensor cores, weights in FP8 alone multiply in BF16, FP8 twice as fast."""
    us = {recipe: products_us(recipe) for recipe in ("fp32", "bf16", "weight-only", "deepseek-v3")}
    assert us["fp32"] > 5 * us["bf16"]
    assert us["weight-only"] == pytest.approx(us["bf16"], rel=0.05)
    assert us["deepseek-v3"] < 0.8 * us["bf16"]


def test_few_tokens_read_fewer_bytes_of_fp8_weights() -> None:
    assert products_us("weight-only", "decode") < products_us("bf16", "decode") < products_us("fp32", "decode")


@pytest.mark.parametrize("layout", [{"ranks": 1}, {"ranks": 2, "tp": 2}, {"ranks": 4, "tp": 2}])
def test_products_of_a_rank_are_those_of_its_types(layout: dict[str, Any]) -> None:
    """Operations of the cost model are those of the op table, whose types are one rank's already."""
    made = plan("bf16", **layout)
    sizes = phase_sizes("prefill", 64, 1024, 1024) | {"T": 8192}
    times = [t for t in op_times(made.ir, made.context) if t.op.name == "linear"]
    assert len(times) >= 8
    for time in times:
        assert time.cost is not None, time.why
        if set("TR") & {str(d) for d in time.op.result.type.shape}:  # type: ignore[union-attr]
            assert time.cost.flops == op_cost(time.op, sizes | {"R": 8}).flops


def test_micro_batches_and_pipelines_of_layers_count_all_tokens_once() -> None:
    """Before and behind split-microbatches and overlap a step has the same products and the same exchanges."""
    made = [
        moec.trace("tiny-deepseek-v3", WIDE | {"num_hidden_layers": "6"}).optimize(
            "h800", phase="decode", batch=64, context=1024, recipe="bf16", layout=LayoutRequest(ranks=8),
            passes=[f"split-microbatches{{count={count}}}"],
        )
        for count in (1, 2)
    ]  # fmt: skip
    flops = []
    for each in made:
        times = op_times(each.ir, each.context)
        assert all(t.cost is not None for t in times)
        flops.append(sum(t.cost.flops * t.runs for t in times if t.op.name == "linear" and t.cost))
        scheduled, serial = step_us(each.ir, times, "decode")
        assert 0 < scheduled <= serial
    assert flops[0] == pytest.approx(flops[1])


def test_an_fp8_cache_is_cheaper_to_read() -> None:
    us = {}
    for cache in ("bf16", "fp8"):
        made = moec.trace("deepseek-v3", {"num_hidden_layers": "4"}).optimize(
            "h100", phase="decode", batch=64, context=4096, layout=LayoutRequest(ranks=1),
            passes=[f"fp8-cast{{cache={cache}}}"],
        )  # fmt: skip
        us[cache] = sum(t.step_us for t in op_times(made.ir, made.context) if t.op.name == "attn.mla_absorbed")
    assert us["fp8"] != us["bf16"]
