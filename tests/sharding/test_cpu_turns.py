"""A schedule in the IR as turns of CPU ranks: every step once, and nothing before what it needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.codegen.scheduled import Turn, arrange, crossing, runs
from moec.errors import InputError
from moec.ir import Module
from moec.ir.rewrite import clone_module
from moec.passes.planning import LayoutRequest
from moec.targets import load

TARGET = Path(__file__).parents[2] / "benchmarks" / "cpu_with_network.yaml"
PASSES = ["split-microbatches{count=2,phase=decode}", "overlap{phase=decode}"]


def planned(passes: list[str] = PASSES, batch: int = 64, bandwidth: float = 0.1) -> Any:
    """`bandwidth`: of each process's card in GB/s; exchanges that last longer give other orders."""
    target = load(str(TARGET))
    assert target.node.scale_out is not None
    card = replace(target.node.scale_out, bandwidth=bandwidth * 1e9)
    target = replace(target, node=replace(target.node, scale_out=card))
    return moec.trace("tiny-deepseek-v3", {"num_hidden_layers": "6"}).optimize(
        target, batch=batch, context=64, layout=LayoutRequest(ranks=2), recipe="fp32", passes=passes
    )


def arranged(count: int = 2, batch: int = 64, bandwidth: float = 0.1) -> tuple[Module, list[Turn]]:
    plan = planned([f"split-microbatches{{count={count},phase=decode}}", PASSES[1]], batch, bandwidth)
    base = clone_module(plan.unscheduled)
    return base, arrange(base, plan.ir, "decode")


@pytest.mark.parametrize(
    ("count", "batch", "bandwidth"), [(2, 64, 0.1), (2, 4, 0.1), (2, 8, 1.0), (3, 8, 0.02), (3, 9, 1.0), (4, 64, 0.05)]
)
def test_every_step_runs_once_for_each_part_and_layer_and_after_what_it_needs(
    count: int, batch: int, bandwidth: float
) -> None:
    base, turns = arranged(count, batch, bandwidth)
    layer = next(f for f in base.functions.values() if "segments" in f.attrs)
    call = next(op for op in base.functions["decode"].ops if op.attrs.get("func") == layer.name)
    first, last = int(str(call.attrs["first"])), int(str(call.attrs["last"]))
    steps = list(runs(base, layer))
    offset = next(i for i, (kind, _) in enumerate(runs(base, base.functions["decode"])) if kind == "loop")
    group = {op: offset + i for i, (_, ops) in enumerate(steps) for op in ops}
    made = layer.producer()
    needs = {
        group[op]: {group[made[v]] for o in ops for v in o.values() if v in made} - {group[op]}
        for _, ops in steps
        for op in ops[:1]
    }
    done: set[tuple[int, int, int]] = set()
    for what, part, at, step in turns:
        if at < 0:
            continue
        key = part, at, step
        if what == "start":
            assert all((part, at, other) in done for other in needs[step])
            continue
        assert key not in done, f"{key} twice"
        assert all((part, at, other) in done for other in needs[step]), f"{key} too early"
        if at > first and step == offset:
            assert (part, at - 1, offset + len(steps) - 1) in done
        done.add(key)
    assert done == {(p, at, s) for p in range(count) for at in range(first, last + 1) for s in set(group.values())}
    started = [turn[1:] for turn in turns if turn[0] == "start"]
    assert len(started) == len(set(started)) == 2 * count * (last - first + 1)


def test_something_runs_between_start_and_wait() -> None:
    _, turns = arranged()
    apart = []
    for at, (what, *key) in enumerate(turns):
        if what == "start":
            apart.append(turns.index(("wait", *key)) - at)  # type: ignore[arg-type]
    assert max(apart) > 1


def test_values_between_segments_are_kept() -> None:
    base, _ = arranged()
    layer = next(f for f in base.functions.values() if "segments" in f.attrs)
    kept = crossing(base, layer)
    dispatch = next(op for op in layer.ops if op.name == "comm.dispatch")
    assert {v for v in dispatch.values() if v in layer.producer()} <= kept
    assert set(dispatch.results) <= kept


def test_only_decode_follows_a_schedule(tmp_path: Path) -> None:
    plan = planned(passes=["split-microbatches{count=2}", "overlap"])
    with pytest.raises(InputError, match="phase=decode"):
        plan.compile(tmp_path / "m.moec", random_weights=0)
