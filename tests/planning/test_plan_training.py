"""The training step beside what was published of DeepSeek-V3's (arXiv 2505.09343, Table 4), and its directions."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import typer
from typer.testing import CliRunner

import moec
from moec import targets
from moec.cli.plan import register
from moec.errors import InputError
from moec.ir import Module
from moec.passes.planning import LayoutRequest, TrainingPlan, TrainOptions, changed, make_training_plan


@cache
def model() -> Module:
    return moec.trace("deepseek-v3").ir


@cache
def plan(options: TrainOptions, what_if: str = "") -> TrainingPlan:
    target = targets.load("h800-2048")
    return make_training_plan(model(), changed(target, what_if) if what_if else target, options)


V3 = TrainOptions()


@pytest.mark.parametrize(
    ("what", "published"),
    [("step_s", 19.926), ("tokens_per_day", 272.80e9), ("F", 1.13), ("B", 1.99), ("F&B", 13.95), ("optimiser_s", 0.29)],
)
def test_the_published_step_within_a_fifth(what: str, published: float) -> None:
    found = plan(V3)
    value = found.parts[what] if what in found.parts else getattr(found, what)
    assert value == pytest.approx(published, rel=0.2)


def test_published_rates_within_a_fifth_and_operations_within_two_percent() -> None:
    found = plan(V3)
    assert found.tokens == 62_914_560
    assert found.flops_per_token["causal"] / 1e9 == pytest.approx(250, rel=0.02)
    assert found.tflops("causal") == pytest.approx(385, rel=0.2)
    assert found.tflops("non-causal") == pytest.approx(432, rel=0.2)
    assert found.mfu("causal") == pytest.approx(0.3894, rel=0.2)
    assert found.fits


def test_the_step_is_its_parts() -> None:
    found = plan(V3)
    assert found.step_s == pytest.approx(sum(found.parts.values()) + found.bubble_s + found.optimiser_s)
    assert sum(found.split) == 61
    assert len(found.split) == 16


def test_schedules_rank_by_their_bubbles_and_hold_the_published_activations() -> None:
    steps = {name: plan(replace(V3, schedule=name)) for name in ("1f1b", "zb1p", "dualpipe")}
    assert steps["dualpipe"].step_s < steps["zb1p"].step_s < steps["1f1b"].step_s
    assert steps["zb1p"].bubble_s < steps["1f1b"].bubble_s
    assert max(m.micro_batches for m in steps["1f1b"].memory) == 16
    assert max(m.micro_batches for m in steps["dualpipe"].memory) == 17
    doubled = [steps[name].memory[3].weights for name in ("1f1b", "dualpipe")]
    assert doubled[1] == pytest.approx(2 * doubled[0])
    folded = plan(replace(V3, schedule="dualpipev", layout=LayoutRequest(pp=8, ep=64)))
    assert len(folded.split) == 16
    assert len(folded.memory) == 8


def test_exchanges_show_only_where_nothing_hides_them() -> None:
    slow = plan(V3, "scale_out=0.5x")
    assert slow.chunk.forward > plan(V3).chunk.forward
    assert slow.chunk.overlapped < 1.1 * plan(V3).chunk.overlapped
    crawling = plan(V3, "scale_out=0.1x")
    assert crawling.cell.exchange_us > crawling.cell.compute_us
    assert crawling.chunk.overlapped == pytest.approx(crawling.cell.exchange_us * 1e-6)


def test_the_overlapped_layer_is_scheduled_not_assumed() -> None:
    """The order found is no longer than DualPipe's, and neither is shorter than computation or exchanges alone."""
    for change in ("", "scale_out=0.5x", "scale_out=0.25x"):
        layer = plan(V3, change).layer
        assert layer is not None
        tasks = {task.name: task.modes[0].us for task in layer.graph.tasks}
        links = sum(us for name, us in tasks.items() if name.startswith(("dispatch", "combine")))
        least = max(links, sum(tasks.values()) - links)
        assert least - 1e-3 <= layer.bound_us <= layer.interval_us + 1e-6
        assert layer.interval_us <= layer.published_us * (1 + 1e-9)
        place = {name: i for i, name in enumerate(layer.order["compute"])}
        assert set(place) == {f"{part}.{kind}" for part in ("attn", "mlp", "shared") for kind in "FBW"} | {
            "tail.F", "tail.B"
        }  # fmt: skip


def test_all_parameters_are_held_by_the_devices_together() -> None:
    found = plan(replace(V3, schedule="1f1b"))
    # FP32 gradients of experts on 64 devices and of the rest on each of them.
    experts = 58 * 256 * 3 * 7168 * 2048
    gradients = sum(m.gradients for m in found.memory) / 4
    assert gradients == pytest.approx(experts / 64 + 671026419200 - experts, rel=1e-3)


def test_longer_sequences_cost_attention() -> None:
    options = TrainOptions(sequence=8192, global_batch=7680)
    assert plan(options).tokens == plan(V3).tokens
    assert plan(options).flops_per_token["causal"] > plan(V3).flops_per_token["causal"]


def run(*words: str) -> str:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["deepseek-v2-lite", "--target", "h800", "--phase", "train", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_the_command() -> None:
    answer = json.loads(run("--ranks", "32", "--pp", "4", "--ep", "8", "--global-batch", "512", "--json"))
    assert answer["step_s"] == pytest.approx(sum(answer["parts_s"].values()))
    assert len(answer["memory_bytes"]) == 4
    text = run("--ranks", "32", "--pp", "4", "--ep", "8", "--global-batch", "512", "--schedule", "zb1p")
    assert "billion tokens a day" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "32", "--pp", "4", "--global-batch", "500"], "try 496"),
        (["--ranks", "32", "--pp", "4", "--ep", "8", "--global-batch", "40"], "twice as many micro-batches as stages"),
        (["--schedule", "dualpip"], "did you mean dualpipe"),
        (["--sequence", "0"], "sequence must be at least 1"),
        (["--page", "x.html"], "--page shows plans"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run(*words)
    assert message in str(caught.value)
