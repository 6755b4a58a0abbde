"""Traffic between nodes: the published arithmetic of DeepSeek-V3, a simulation, and placement that knows the pairs."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from moec.passes.placement import Placement, Problem, place
from moec.passes.placement.movement import moved_slots
from moec.passes.placement.partners import together
from moec.passes.placement.problem import Ints
from moec.passes.placement.report import device_links
from moec.passes.placement.summary import Routing, estimate_traffic
from moec.passes.placement.traffic import paired_traffic, routed_traffic, sample_routing


def v3(groups: int) -> tuple[Problem, Placement]:
    """256 experts in 8 groups on 8 nodes of 8 devices, 4 experts a device, as trained."""
    problem = Problem.of(np.ones((1, 256)), devices=64, slots_per_device=4, devices_per_node=8, groups=groups)
    return problem, place(problem).placement


def pairs_of(chosen: Ints, experts: int) -> tuple[np.ndarray, np.ndarray]:
    onehot = np.zeros((len(chosen), experts))
    np.put_along_axis(onehot, chosen, 1.0, axis=1)
    return onehot.sum(axis=0)[None], (onehot.T @ onehot)[None]


def test_v3_sends_eight_copies_or_one_to_each_of_at_most_four_nodes() -> None:
    """arXiv 2505.09343, sec. 4.3: 8t without deduplication, M t with it, M <= 4 distinct nodes."""
    _, placement = v3(groups=8)
    rng = np.random.default_rng(0)
    chosen = sample_routing(rng, np.ones(256), 4000, 8, groups=8, top_groups=4)
    node = placement.physical_to_logical_map[0].argsort()[chosen] // 32
    visited = np.array([len(set(row)) for row in node.tolist()])
    assert visited.max() == 4
    traffic = routed_traffic(rng, placement, chosen[None])
    assert traffic.direct.sum() == pytest.approx(8.0)
    assert traffic.forwarded.sum() == pytest.approx(visited.mean())
    assert traffic.copies_direct == pytest.approx(8 * 7 / 8)
    assert traffic.between(forwarding=True).sum() == pytest.approx(traffic.copies_forwarded)


def test_without_limited_routing_a_token_visits_more_nodes() -> None:
    """Eight of 256 experts at random on 8 nodes of 32: the hypergeometric expectation of distinct nodes."""
    _, placement = v3(groups=1)
    rng = np.random.default_rng(1)
    chosen = sample_routing(rng, np.ones(256), 40000, 8)
    missed = np.prod([(224 - i) / (256 - i) for i in range(8)])
    forwarded = routed_traffic(rng, placement, chosen[None]).forwarded.sum()
    assert forwarded == pytest.approx(8 * (1 - missed), rel=0.01)


def test_sampled_routing_never_repeats_an_expert_and_follows_the_loads() -> None:
    loads = np.array([8.0, 4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    chosen = sample_routing(np.random.default_rng(2), loads, 20000, 1)
    assert np.bincount(chosen.ravel(), minlength=8) / 20000 == pytest.approx(loads / 16, abs=0.01)
    several = sample_routing(np.random.default_rng(3), loads, 500, 4)
    assert all(len(set(row)) == 4 for row in several.tolist())


def test_the_bounds_from_pairs_hold_the_exact_count() -> None:
    rng = np.random.default_rng(5)
    chosen = sample_routing(rng, rng.random(32) + 0.1, 5000, 4, groups=4, top_groups=2)
    loads, pairs = pairs_of(chosen, 32)
    problem = Problem.of(loads, devices=8, slots_per_device=4, devices_per_node=2)
    placement = place(problem).placement
    exact = routed_traffic(rng, placement, chosen[None])
    least, most = paired_traffic(placement, loads, pairs, 4)
    assert least.direct == pytest.approx(exact.direct)
    assert (least.forwarded <= exact.forwarded + 1e-9).all()
    assert (most.forwarded >= exact.forwarded - 1e-9).all()


def test_replicas_are_drawn_by_their_shares() -> None:
    mapping, shares = np.array([[0, 1, 0, 2]]), np.array([[0.25, 1.0, 0.75, 1.0]])
    placement = Placement(mapping, shares, experts=3, devices=4, nodes=4)
    received = routed_traffic(np.random.default_rng(0), placement, np.zeros((1, 20000, 1), np.int64)).direct[0]
    assert received == pytest.approx([0.25, 0.0, 0.75, 0.0], abs=0.01)


def test_knowing_the_pairs_lowers_traffic_of_unseen_tokens(baseline: ModuleType) -> None:
    rng = np.random.default_rng(6)
    loads, pairs, fresh = baseline.partnered(rng, baseline.skewed(rng, 2, 64, 0.5), 3000, 8)
    problem = Problem.of(loads, devices=8, slots_per_device=9, devices_per_node=2)
    blind, knowing = place(problem), place(problem, coactivation=pairs, slack=0.005)
    assert (together(knowing.placement, pairs) > together(blind.placement, pairs)).all()
    assert (knowing.greatest <= np.maximum(blind.greatest, knowing.bound * 1.005) * (1 + 1e-9)).all()
    before, after = (routed_traffic(np.random.default_rng(0), r.placement, fresh) for r in (blind, knowing))
    assert after.copies_forwarded < before.copies_forwarded * 0.99
    assert after.copies_direct == pytest.approx(before.copies_direct, rel=0.02)


def test_device_links_carry_what_the_nodes_exchange() -> None:
    problem, _ = v3(groups=8)
    result = place(problem)
    estimate = estimate_traffic(problem, result.placement, Routing(8, 4), None)
    assert estimate.sampled
    node = np.arange(64) // 8
    crossing = node[:, None] != node[None, :]
    direct = device_links(result, estimate.most, forwarding=False)
    forwarded = device_links(result, estimate.most, forwarding=True)
    assert direct[crossing].sum() == pytest.approx(estimate.most.copies_direct, rel=0.02)
    assert forwarded[crossing].sum() == pytest.approx(estimate.most.copies_forwarded)


def test_the_same_loads_again_move_nothing(baseline: ModuleType) -> None:
    loads = baseline.skewed(np.random.default_rng(9), 3, 64, 0.8)
    problem = Problem.of(loads, devices=8, slots_per_device=9, devices_per_node=4)
    first = place(problem).placement
    again = place(problem, previous=first, seed=1).placement
    assert moved_slots(again, first) == 0
    assert (again.physical_to_logical_map == first.physical_to_logical_map).all()


@pytest.mark.parametrize("groups", [1, 8])
def test_changed_loads_move_less_when_the_previous_placement_is_known(baseline: ModuleType, groups: int) -> None:
    rng = np.random.default_rng(10)
    loads = baseline.skewed(rng, 3, 64, 0.8)
    before = place(Problem.of(loads, devices=8, slots_per_device=9, devices_per_node=4, groups=groups)).placement
    drifted = loads * rng.gamma(4.0, 0.25, size=loads.shape)
    problem = Problem.of(drifted, devices=8, slots_per_device=9, devices_per_node=4, groups=groups)
    blind, knowing = place(problem), place(problem, previous=before)
    assert knowing.greatest == pytest.approx(blind.greatest)
    assert moved_slots(knowing.placement, before) < moved_slots(blind.placement, before)
