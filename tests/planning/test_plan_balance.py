"""The expected balance of experts beside published measurements, and its directions."""

from __future__ import annotations

import math
import random

import pytest

from moec.passes.planning.balance import DRIFT, expected_balance, expected_maximum, placement_limit
from moec.passes.planning.layout import Layout, levelling_slots


def layout(ep: int, slots: int, experts: int = 256) -> Layout:
    return Layout(tp=1, dp=ep, ep=ep, experts=experts, slots=slots)


def test_the_published_scatter_gives_the_published_maximum() -> None:
    # TensorRT-LLM, Scaling expert parallelism, part 1, Table 1, nine slots at EP 32: std 52.0 around a mean of 1024
    # rows, (max - mean) / mean of 0.109.
    assert expected_maximum(32) * 52.0 / 1024 == pytest.approx(0.109, abs=0.005)
    assert math.hypot(DRIFT * 1024, math.sqrt(1024)) == pytest.approx(52.0, rel=0.01)


@pytest.mark.parametrize("count", [2, 8, 32, 144])
def test_the_expected_maximum_is_that_of_normal_draws(count: int) -> None:
    draw = random.Random(count)
    sampled = sum(max(draw.gauss(0, 1) for _ in range(count)) for _ in range(4000)) / 4000
    assert expected_maximum(count) == pytest.approx(sampled, abs=0.05)


def test_zipf_loads_have_the_published_heaviest_expert() -> None:
    # One slot for each expert: the heaviest takes 11.9 times the mean, as in the same table's 10.948 above it.
    assert placement_limit(256, 256, 256) == pytest.approx(11.9, rel=0.03)
    assert placement_limit(256, 288, 32) == pytest.approx(1.0, abs=1e-9)


def test_directions() -> None:
    many, few = expected_balance(layout(32, 288), 4096, 1e5), expected_balance(layout(32, 288), 64, 1e5)
    assert 0 < few < many < 1
    assert expected_balance(layout(144, 288), 4096, 1e5) < many
    replicas = [expected_balance(layout(64, 256 + extra), 4096, 1e5) for extra in (0, 64, 128)]
    assert replicas == sorted(replicas)
    assert expected_balance(layout(32, 288), 4096, 100) < many
    assert expected_balance(layout(1, 256), 1, 1) == 1


@pytest.mark.parametrize(
    ("ep", "experts", "redundant"),
    [(32, 256, 32), (144, 256, 32), (72, 256, 32), (96, 384, 96), (16, 256, 0), (1, 256, 0)],
)
def test_levelling_redundancy_is_what_the_published_deployments_chose(ep: int, experts: int, redundant: int) -> None:
    # DeepSeek's prefill and decode units (open-infra-index, day 6), SGLang's decode, Kimi K2 on 96 H200.
    assert levelling_slots(experts, ep) - experts == redundant
