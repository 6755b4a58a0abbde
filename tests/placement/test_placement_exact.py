"""Search and bounds against exact solvers (CP-SAT, HiGHS) on small random layers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moec.passes.placement import Problem, place
from moec.passes.placement.bounds import lower_bound
from moec.passes.placement.counts import spread_widest
from moec.passes.placement.crowding import crowded_bound
from moec.passes.placement.exact import exact_even, exact_free, exact_layer, exact_pairs, prove
from moec.passes.placement.heavy import settle
from moec.passes.placement.packing import Packing, pack
from moec.passes.placement.resplit import resplit


@pytest.mark.parametrize("devices, slots, experts", [(3, 3, 7), (4, 3, 10), (3, 4, 9), (2, 6, 9)])
def test_search_is_near_the_even_optimum(devices: int, slots: int, experts: int) -> None:
    rng = np.random.default_rng(devices * 100 + experts)
    for _ in range(2):
        loads = rng.random((1, experts)) ** 2
        result = place(Problem.of(loads, devices=devices, slots_per_device=slots))
        hint = result.placement.physical_to_logical_map[0]
        exact = exact_even(loads[0], devices, devices * slots, seconds=20, hint=hint)
        assert exact.lower >= lower_bound(loads, devices, devices * slots)[0] * (1 - 1e-6)
        assert exact.greatest <= result.greatest[0] * (1 + 1e-6)
        assert result.greatest[0] <= exact.lower * 1.01


@pytest.mark.parametrize("devices, experts", [(4, 6), (6, 9), (12, 20), (36, 64)])
def test_search_is_near_the_optimal_pairs(devices: int, experts: int) -> None:
    loads = 1.0 / np.arange(1, experts + 1) ** 0.8 * np.random.default_rng(experts).gamma(20, 1 / 20, experts)
    result = place(Problem.of([loads], devices=devices, slots_per_device=2))
    exact = exact_pairs(loads, 2 * devices, seconds=20)
    assert exact.greatest >= exact.lower * (1 - 1e-9)
    assert result.greatest[0] <= exact.greatest * 1.01
    assert result.greatest[0] >= exact.lower * (1 - 1e-9)


def test_the_two_exact_solvers_agree() -> None:
    rng = np.random.default_rng(4)
    for _ in range(3):
        loads = rng.random(6) ** 2
        pairs = exact_pairs(loads, 8, seconds=20)
        even = exact_even(loads, 4, 8, seconds=20, hint=pairs.packing.experts.ravel())
        assert pairs.greatest == pytest.approx(even.greatest, rel=2e-4)


@pytest.mark.parametrize("devices, slots, experts", [(4, 2, 6), (4, 2, 7), (5, 2, 8), (3, 3, 8)])
def test_free_shares_are_near_their_optimum(devices: int, slots: int, experts: int) -> None:
    """Fewer redundant slots than devices: components of unequal load are unavoidable."""
    rng = np.random.default_rng(experts)
    for _ in range(2):
        loads = rng.random((1, experts)) + 0.2
        result = place(Problem.of(loads, devices=devices, slots_per_device=slots), shares="free")
        exact = exact_free(loads[0], devices, devices * slots, seconds=20)
        assert result.greatest[0] >= exact.lower * (1 - 1e-6)
        assert result.greatest[0] <= exact.greatest * 1.05


def test_proving_improves_and_never_worsens() -> None:
    loads = np.random.default_rng(8).random((3, 10)) ** 2
    problem = Problem.of(loads, devices=4, slots_per_device=3)
    result = place(problem)
    proven = prove(result, shares="even", seconds=10)
    assert (proven.bound >= result.bound - 1e-12).all()
    assert (proven.greatest <= result.greatest + 1e-12).all()
    assert (proven.bound <= proven.greatest * (1 + 1e-9)).all()
    assert proven.placement.greatest_loads(loads) == pytest.approx(proven.greatest)


def test_large_problems_are_refused_in_one_line() -> None:
    from moec.passes.placement.errors import SearchTooLarge

    with pytest.raises(SearchTooLarge, match="at most 4000"):
        exact_layer(np.ones(256), 32, 288, even=True, seconds=1)


def test_the_crowded_bound_holds_and_sees_more() -> None:
    """Few heavy experts and few spare slots: never above the optimum, and above the simple bounds for some."""
    rng, sharper = np.random.default_rng(3), 0
    for _ in range(12):
        loads = 1.0 / np.arange(1, 9) ** rng.uniform(1, 3) * rng.gamma(5, 0.2, 8)
        bound, simple = crowded_bound(loads[None], 4, 12)[0], lower_bound(loads[None], 4, 12)[0]
        found = exact_even(loads, 4, 12, seconds=3)
        assert bound <= found.greatest * (1 + 1e-6)
        sharper += bound > simple * (1 + 1e-3)
    assert sharper > 1


@pytest.mark.parametrize(("devices", "slots", "groups", "least"), [(32, 9, 1, 12), (64, 5, 1, 6), (32, 9, 8, 24)])
def test_one_hot_expert_is_placed_optimally(devices: int, slots: int, groups: int, least: float) -> None:
    """An expert as heavy as 128 others: a device with one of its replicas fills up with whole others."""
    loads = np.ones((1, 256))
    loads[0, 7] = 128
    result = place(Problem.of(loads, devices=devices, slots_per_device=slots, devices_per_node=8, groups=groups))
    assert result.bound[0] == pytest.approx(least) == result.greatest[0]


def test_the_crowded_bound_never_exceeds_the_optimum() -> None:
    """Small layers of a few heavy experts and many alike, with much and little room for replicas."""
    rng = np.random.default_rng(77)
    reached = 0
    for _ in range(12):
        devices, per_device, heavy = (int(rng.integers(2, most)) for most in (5, 5, 3))
        experts = max(3, devices * per_device - int(rng.integers(1, 5)))
        loads = rng.random(experts) * 0.2 + 0.5 * (rng.random() < 0.5)
        loads[:heavy] *= rng.uniform(2, 12, heavy)
        exact = exact_even(loads, devices, devices * per_device, seconds=3)
        bound = crowded_bound(loads[None], devices, devices * per_device)[0]
        assert bound <= exact.greatest * (1 + 1e-6)
        reached += bound >= exact.greatest * (1 - 1e-3)
    assert reached > 1


def test_settled_problems_are_near_the_optimum_and_their_bound_is_below_it() -> None:
    """Steep loads and few spare slots, from the greedy packing on, beside CP-SAT."""
    rng = np.random.default_rng(5)
    better = sharper = 0
    for _ in range(12):
        devices, per_device = int(rng.integers(2, 5)), int(rng.integers(2, 5))
        slots = devices * per_device
        experts = max(3, slots - int(rng.integers(1, 5)))
        loads = rng.permutation(1.0 / np.arange(1, experts + 1) ** rng.uniform(0.5, 2.5)) * rng.gamma(9, 1 / 9, experts)
        start = pack(loads[None], spread_widest(loads[None], slots), devices)
        simple = float(lower_bound(loads[None], devices, slots)[0])
        packing, bound = settle(loads, devices, slots, start, simple)
        exact = exact_even(loads, devices, slots, seconds=5)
        counts = np.bincount(packing.experts.ravel(), minlength=experts)
        assert packing.sizes == pytest.approx((loads / counts)[packing.experts])
        assert packing.greatest[0] <= start.greatest[0] * (1 + 1e-12)
        assert simple <= bound <= exact.greatest * (1 + 1e-6)
        assert packing.greatest[0] >= exact.lower * (1 - 1e-6)
        better += packing.greatest[0] < start.greatest[0]
        sharper += bound > simple * (1 + 1e-3)
    assert better > 1 and sharper > 1


@pytest.mark.parametrize("per_device", [3, 5, 6])
def test_two_devices_are_split_optimally(per_device: int) -> None:
    rng = np.random.default_rng(per_device)
    sizes = rng.random((6, 2, per_device))
    packing = Packing(np.arange(2 * per_device).reshape(1, 2, -1).repeat(6, axis=0), sizes.copy())
    resplit(packing, np.zeros(6), 9)
    flat = sizes.reshape(6, -1)
    assert np.array_equal(
        np.take_along_axis(flat, packing.experts.reshape(6, -1), axis=1), packing.sizes.reshape(6, -1)
    )
    for row, values in enumerate(flat):
        halves = [sum(part) for part in combinations(values, per_device)]
        assert packing.greatest[row] == pytest.approx(min(max(h, values.sum() - h) for h in halves))
