"""Sizes and prices against Table 3 of Insights into DeepSeek-V3 (arXiv 2505.09343), and against counted graphs."""

from __future__ import annotations

import pytest

from moec import targets
from moec.targets import TopologyChoice
from moec.targets.topology import (
    Prices,
    Topology,
    WrongTopology,
    build,
    dragonfly,
    fat_tree_2,
    fat_tree_3,
    multi_plane_fat_tree_2,
    slim_fly,
)

# endpoints, switches, links, M$, k$ per endpoint, as printed for 64-port switches
PUBLISHED = [
    (fat_tree_2(64), 2048, 96, 2048, "9", 4.39),
    (multi_plane_fat_tree_2(64, 8), 16384, 768, 16384, "72", 4.39),
    (fat_tree_3(64), 65536, 5120, 131072, "491", 7.5),
    (slim_fly(64), 32928, 1568, 32928, "146", 4.4),
    (dragonfly(64, groups=511), 261632, 16352, 384272, "1522", 5.8),
]


@pytest.mark.parametrize(("net", "endpoints", "switches", "links", "millions", "each"), PUBLISHED)
def test_published_table(net: Topology, endpoints: int, switches: int, links: int, millions: str, each: float) -> None:
    assert (net.endpoints, net.switches, net.all_links) == (endpoints, switches, links)
    price = net.price(Prices())
    assert f"{price / 1e6:.0f}" == millions
    assert price / endpoints / 1e3 == pytest.approx(each, abs=0.05 if each * 10 == round(each * 10) else 0.005)


@pytest.mark.parametrize("ports", [4, 8, 16, 48, 128])
def test_ports_are_enough(ports: int) -> None:
    """Every cable between switches takes two ports and every endpoint one."""
    for net in (fat_tree_2(ports), fat_tree_3(ports)):
        assert 2 * net.all_links + net.endpoints == net.switches * ports
    for net in (slim_fly(max(ports, 8)), dragonfly(ports)):
        assert 2 * net.all_links + net.endpoints <= net.switches * net.ports


def test_dragonfly_groups_reach_each_other() -> None:
    net = dragonfly(16)
    groups = net.switches // 8
    assert net.links == groups * (groups - 1) // 2


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (TopologyChoice("fat-tree-2", 7), "even number"),
        (TopologyChoice("slim-fly", 3), "q must be one of none"),
        (TopologyChoice("torus", 64), "unknown"),
        (TopologyChoice("multi-plane-fat-tree-2", 64, 0), "at least one plane"),
    ],
)
def test_wrong_topologies(choice: TopologyChoice, words: str) -> None:
    with pytest.raises(WrongTopology, match=words):
        build(choice)
    with pytest.raises(WrongTopology, match="2 to 513"):
        dragonfly(64, groups=514)


def test_the_training_cluster_fits_its_network() -> None:
    target = targets.load("h800-2048")
    assert target.cluster.topology is not None
    assert build(target.cluster.topology).endpoints >= target.cluster.ranks
