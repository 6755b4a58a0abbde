"""The passes split-microbatches and overlap: results stay, splitting is declined where it loses, plans are followed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import moec
from moec import targets
from moec.ir import WeightRef, parse_module
from moec.ir.issue import Issued, Tracer, is_view
from moec.passes.planning import LayoutRequest
from moec.passes.planning.rows import Step
from moec.passes.scheduling.graph import TaskGraph
from moec.passes.scheduling.order import shortest_interval
from moec.passes.streams.costs import prompt_cuts

Text = Callable[..., str]


def notes(plan: Any, name: str) -> str:
    return "\n".join(line for record in plan.records if record.name == name for line in record.notes)


@pytest.mark.parametrize(("ranks", "count"), [(2, "2"), (2, "1")])
def test_results_stay_the_same(ranks: int, count: str) -> None:
    """The reference evaluator agrees to rounding of float64 before and after every pass, pipelines of layers too."""
    plan = moec.trace("tiny-deepseek-v3", {"num_hidden_layers": "6"}).optimize(
        "h800",
        batch=64,
        context=256,
        layout=LayoutRequest(ranks=ranks),
        recipe="bf16",
        passes=[f"split-microbatches{{count={count}}}"],
        verify="numerics",
    )
    assert "event.wait" in str(plan.ir)
    assert int(str(plan.ir.functions["decode"].attrs.get("micro_batches", 1))) == int(count)


def test_prompts_are_split_where_there_are_too_few() -> None:
    """One prompt in two parts: the second attends to what the first left in the cache, in every evaluation."""
    plan = moec.trace("tiny-deepseek-v3", {"num_hidden_layers": "5"}).optimize(
        "h800",
        phase="prefill",
        batch=1,
        context=512,
        layout=LayoutRequest(ranks=2),
        recipe="bf16",
        passes=["split-microbatches{count=2}"],
        verify="numerics",
    )
    entry = plan.ir.functions["prefill"]
    parts = entry.attrs["prompt_parts"]
    assert isinstance(parts, tuple) and sum(int(str(p)) for p in parts) == 512
    assert "2 micro-batches of one prompt" in notes(plan, "split-microbatches")
    assert "interval_us" in str(plan.ir)
    order = list(Tracer(plan.ir).run(entry))
    for layer in range(5):
        mine = [i.op for i in order if i.layer is not None and _layer(i) == layer]
        written = next(k for k, op in enumerate(mine) if op.name == "cache.append" and op.attrs["micro_batch"] == 0)
        read = next(k for k, op in enumerate(mine) if op.name == "cache.read" and op.attrs["micro_batch"] == 1)
        assert written < read


def _layer(issued: Issued) -> int:
    """The layer that an op of a pipelined function works on."""
    used = [i for o in issued.op.operands for i in (o.indices if isinstance(o, WeightRef) else (o,))]
    shifted = next((o for o in issued.function.ops if o.name == "index.affine" and o.results[0] in used), None)
    assert issued.layer is not None
    return issued.layer + (int(str(shifted.attrs["offset"])) if shifted is not None else 0)


def test_cuts_balance_attention() -> None:
    """The parts of a prompt take as long: with attention alone the first has a share of the square root of a half."""
    step = Step("prefill", 1, 8192, 8192)
    assert prompt_cuts(step, 2, 100.0, 0.0) == (4096, 4096)
    first, second = prompt_cuts(step, 2, 0.0, 100.0)
    assert first == pytest.approx(8192 * 2**-0.5, abs=64) and first + second == 8192
    # Behind a long prefix all tokens attend to about as much.
    first, second = prompt_cuts(Step("prefill", 1, 8192, 1 << 20), 2, 0.0, 100.0)
    assert abs(first - second) <= 128
    assert prompt_cuts(Step("prefill", 1, 200, 200), 2, 1.0, 1.0) == ()
    assert sum(prompt_cuts(Step("prefill", 1, 300, 300), 2, 1.0, 1.0)) == 300


def test_layers_follow_each_other_in_a_pipeline(schedule_text: Text) -> None:
    """Prologue, kernel and epilogue run every op of every layer once, in layers that the text says."""
    module = parse_module(schedule_text())
    entry = module.functions["decode"]
    assert [op.name for op in entry.ops if "func" in op.attrs] == ["repeat", "call", "repeat", "call"]
    runs = [i for i in Tracer(module).run(entry) if i.op.name == "moe.experts"]
    assert len(runs) == 2 * 4
    assert len([i for i in Tracer(module).run(entry) if i.op.name == "cache.append"]) == 2 * 6


def test_ops_say_where_and_how_long(schedule_text: Text) -> None:
    module = parse_module(schedule_text())
    for issued in Tracer(module).run(module.functions["decode"]):
        attrs = issued.op.attrs
        if (
            issued.layer is not None
            and issued.layer > 1
            and not is_view(issued.op)
            and not issued.op.name.startswith("event")
        ):
            assert attrs["stream"] == ("comm" if issued.op.name in ("comm.dispatch", "comm.combine") else "compute")
            assert float(str(attrs["us"])) > 0
            assert attrs["micro_batch"] in (0, 1)


def compile_v3(target: str, batch: int, ranks: int) -> Any:
    return moec.trace("deepseek-v3").optimize(
        target, phase="decode", batch=batch, context=2000, layout=LayoutRequest(ranks=ranks, redundant=32)
    )


def test_splitting_is_declined_where_it_loses() -> None:
    """Small batches read all weights twice: both times are reported (32 and 256 tokens a device on 72 H100)."""
    small, large = compile_v3("h100", 32, 72), compile_v3("h100", 256, 72)
    times = {}
    for plan, name in ((small, "small"), (large, "large")):
        found = re.search(r": 1 ([\d.]+) ms, 2 ([\d.]+) ms", notes(plan, "split-microbatches"))
        assert found is not None
        times[name] = float(found[1]) / float(found[2])
    assert "stays whole: splitting loses" in notes(small, "split-microbatches")
    assert "2 micro-batches" in notes(large, "split-microbatches")
    assert times["small"] < 0.9 < 1.2 < times["large"]
    assert "micro_batches" not in small.ir.functions["decode"].attrs
    assert large.ir.functions["decode"].attrs["micro_batches"] == 2


def test_little_compute_declines() -> None:
    """H20s have an eighth of the matrix rate of H800s: weights and products of two halves take longer than exchanges.

    On 16 of them those who published a decode deployment hid exchanges within one batch instead (SGLang, 2025-09).
    """
    found = notes(compile_v3("h20", 64, 16), "split-microbatches")
    times = re.search(r": 1 ([\d.]+) ms, 2 ([\d.]+) ms", found)
    assert times is not None and float(times[1]) < float(times[2])
    assert "stays whole: splitting loses" in found


def test_one_network_adapter_a_node_is_a_matter_of_both_times() -> None:
    """Eight devices on one adapter wait for it longer than halves lose by their size: splitting pays even in small."""
    eight = targets.load("h800")
    one = replace(eight, node=replace(eight.node, nics=1))
    times = {}
    for target in (eight, one):
        plan = moec.trace("deepseek-v3").optimize(
            target, phase="decode", batch=16, context=4096, layout=LayoutRequest(ranks=32)
        )
        found = notes(plan, "split-microbatches")
        both = re.search(r": 1 ([\d.]+) ms, 2 ([\d.]+) ms", found)
        assert both is not None
        whole, halves = float(both[1]), float(both[2])
        assert ("stays whole: splitting loses" in found) is (halves > whole * 0.99)
        assert int(str(plan.ir.functions["decode"].attrs.get("micro_batches", 1))) == (2 if halves < whole else 1)
        times[target.node.nics] = whole / halves
    assert times[8] < 1 < times[1]


def test_one_device_has_nothing_to_hide() -> None:
    plan = moec.trace("tiny-deepseek-v3").optimize("h100", batch=4, context=256, layout=LayoutRequest(ranks=1))
    assert "one device" in notes(plan, "overlap")
    assert "stream" not in str(plan.ir)


def test_orders_published_by_others_are_measured() -> None:
    """The decode layer of the DeepSeek profile: 1280 us with one NIC for both micro-batches, 1020 us without limit."""
    from moec.passes.scheduling import graph_from_json

    us = {"attn0": 60, "attn1": 180, "shared": 40, "dispatch": 190, "mlp": 90, "combine": 360}
    edges = ("attn0 attn1", "attn1 dispatch", "dispatch mlp", "mlp combine", "attn1 shared")
    tasks = [
        {"name": f"{name}.{k}", "us": time, "uses": {"nic" if name in ("dispatch", "combine") else "sm": 1}}
        for k in "ab"
        for name, time in us.items()
    ]
    graph: TaskGraph = graph_from_json(
        {
            "resources": {"sm": 1, "nic": 2},
            "tasks": tasks,
            "edges": [[f"{end}.{k}" for end in edge.split()] for edge in edges for k in "ab"],
            "repeat": [[f"{last}.{k}", f"attn0.{k}", 1] for last in ("combine", "shared") for k in "ab"],
        }
    )
    # Batch b is half a layer behind: its shared expert is still of the layer before.
    compute = ["shared.b@1", "attn0.b", "mlp.a", "attn1.b", "shared.a", "attn0.a@-1", "mlp.b", "attn1.a@-1"]
    links = ["dispatch.a", "combine.a", "dispatch.b", "combine.b"]
    assert shortest_interval(graph, {}, {"sm": compute, "nic": links}) == pytest.approx(1280)
    assert shortest_interval(graph, {}, {"sm": compute}) == pytest.approx(1020)
