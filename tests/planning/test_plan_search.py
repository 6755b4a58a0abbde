"""The search: limits are kept, nothing feasible that was tried is better, and its neighbours agree with the plan."""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import typer
from typer.testing import CliRunner

import moec
from moec import targets
from moec.cli.plan import register
from moec.errors import InputError
from moec.ir import Module
from moec.passes.planning import Found, LayoutRequest, NothingFits, Options, alternatives, make_plan, search
from moec.passes.planning.pipelining import pipelined_us, split_layers


@cache
def model() -> Module:
    return moec.trace("deepseek-v3").ir


OPTIONS = Options(context=4096, batch=64, layout=LayoutRequest(ranks=16))


@cache
def found() -> Found:
    return search(model(), targets.load("h800"), OPTIONS, "decode", 60e3)


def test_every_answer_keeps_the_limits() -> None:
    for candidate in (*found().ranking, *found().front):
        assert candidate.time_us <= 60e3
        assert not candidate.memory.missing
        assert candidate.layout.ranks == 16


def test_the_ranking_is_by_rate_and_holds_each_layout_once() -> None:
    rates = [c.per_device for c in found().ranking]
    assert rates == sorted(rates, reverse=True)
    assert len({c.layout for c in found().ranking}) == len(rates) > 5


def test_the_front_is_not_dominated() -> None:
    front = found().front
    assert [c.time_us for c in front] == sorted(c.time_us for c in front)
    assert [c.per_device for c in front] == sorted(c.per_device for c in front)
    assert front[-1].per_device == pytest.approx(found().ranking[0].per_device)


def test_the_best_is_what_the_planner_says_of_it() -> None:
    best = found().ranking[0]
    redundant = best.layout.slots - best.layout.experts
    layout = LayoutRequest(ranks=16, tp=best.layout.tp, ep=best.layout.ep, pp=best.layout.pp, redundant=redundant)
    plan = make_plan(model(), targets.load("h800"), Options(context=4096, batch=best.batch, layout=layout))
    assert plan.phases["decode"].step_us == pytest.approx(best.time_us)
    assert plan.phases["decode"].per_device == pytest.approx(best.per_device)
    assert plan.phases["decode"].memory == best.memory


def test_the_layout_asked_for_is_ranked() -> None:
    rank = found().rank
    assert rank is not None
    assert found().ranking[rank - 1].layout == make_plan(model(), targets.load("h800"), OPTIONS).layout
    assert found().asked is not None
    assert found().asked.batch == 64  # type: ignore[union-attr]


def test_nothing_fits_in_no_time_or_little_memory() -> None:
    with pytest.raises(NothingFits, match=r"none of .* layouts of 16 devices of h800 holds the model within 0.1 ms"):
        search(model(), targets.load("h800"), OPTIONS, "decode", 100.0)
    with pytest.raises(NothingFits, match="more devices"):
        search(model(), targets.load("h800"), Options(layout=LayoutRequest(ranks=1)), "decode", math.inf)


def test_alternatives_say_what_another_layout_gives() -> None:
    plan = make_plan(model(), targets.load("h800"), OPTIONS)
    best = alternatives(model(), plan)["decode"][0]
    redundant = best.layout.slots - best.layout.experts
    asked = LayoutRequest(16, best.layout.tp, None, best.layout.ep, redundant, best.layout.pp)
    other = make_plan(model(), targets.load("h800"), Options(context=4096, batch=64, layout=asked))
    gain = other.phases["decode"].per_device / plan.phases["decode"].per_device - 1
    assert best.gain == pytest.approx(gain)


@pytest.mark.parametrize(("costs", "stages"), [([1.0] * 61, 16), ([5.0, 1, 1, 1, 1, 9], 3), ([1.0, 2, 3], 3)])
def test_layers_are_split_as_evenly_as_any_split(costs: list[float], stages: int) -> None:
    split = split_layers(costs, stages)
    assert sum(split) == len(costs)
    assert min(split) >= 1
    assert len(split) == stages
    assert pipelined_us(costs, stages, 0.0) == pytest.approx(stages * best_split(tuple(costs), stages))


@cache
def best_split(costs: tuple[float, ...], stages: int) -> float:
    """The smallest largest stage, by trying every place of the first cut."""
    if stages == 1:
        return sum(costs)
    cuts = range(1, len(costs) - stages + 2)
    return min(max(sum(costs[:cut]), best_split(costs[cut:], stages - 1)) for cut in cuts)


def run(*words: str) -> str:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["deepseek-v2-lite", "--target", "h800", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_the_command_prints_ranking_and_front() -> None:
    answer = json.loads(run("--ranks", "8", "--search", "--max-ms", "20", "--json"))
    assert answer["asked_rank"] >= 1
    assert answer["seconds"] > 0
    assert all(c["time_ms"] <= 20 for c in answer["ranking"] + answer["front"])
    text = run("--ranks", "8", "--search", "--max-ms", "20", "--phase", "prefill", "--prompt", "512")
    assert "Pareto front" in text
    assert "the layout asked for" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-ms", "50"], "add --search"),
        (["--search", "--phase", "train"], "serving layouts"),
        (["--search", "--max-ms", "-1"], "must be positive"),
        (["--search", "--target", "h800,h100"], "one target"),
        (["--phase", "decod"], "did you mean decode?"),
        (["--search", "--page", "x.html"], "--page shows plans"),
        (["--pp", "28"], "the model has 27 layers"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run(*words)
    assert message in str(caught.value)
