"""Planning of models with keys and values per head: what attention costs, and what tensor parallelism divides."""

from __future__ import annotations

import pytest

import moec
from moec import targets
from moec.passes.planning import LayoutRequest, Options, make_plan
from moec.passes.planning.sharding import sharded_weights
from moec.targets.cost import op_time


def test_decode_reads_each_head_of_keys_and_values_once() -> None:
    """The cache of mixtral-8x7b: 8 heads of 128 + 128 elements in BF16."""
    row = {"op": "gqa_decode", "batch": 64, "context": 8192, "heads": 32, "kv_heads": 8, "dim": 128, "v_head": 128}
    cost = op_time(row, targets.load("h800"))
    cached = 64 * 8192 * 8 * 256 * 2
    assert cost.bytes == pytest.approx(cached, rel=0.02)
    assert cost.flops == 2 * 64 * 32 * 8192 * 256
    assert cost.bound == "memory"
    assert cost.time_us > cached / 3.35e12 * 1e6


def test_tensor_parallelism_divides_queries_keys_and_values() -> None:
    module = moec.trace("mixtral-8x7b").ir
    cut = {c.name.removeprefix("moe_layers.attn."): c.axis for c in sharded_weights(module)}
    assert cut == {"q": 0, "k": 0, "v": 0, "o": 1}


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "gpt-oss-20b", "llama-4-scout", "llama-3.1-8b"])
def test_every_op_of_a_family_has_a_cost(model: str) -> None:
    module = moec.trace(model).ir
    target = targets.load("h800")
    plan = make_plan(module, target, Options(layout=LayoutRequest(ranks=8), batch=16, context=2048))
    for phase in plan.phases.values():
        names = {op.name.rsplit(".", 1)[-1] for op in phase.ops}
        assert names & {"heads", "sinks"}, names
        assert 0 < phase.serial_us < 1e7
