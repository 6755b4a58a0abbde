"""Scale-out networks: endpoints, switches, links and price of the usual topologies, from their switches' ports.

A link joins two switches; an endpoint's own cable is counted apart. Sources: Al-Fares et al., A scalable, commodity
data center network architecture (SIGCOMM 2008); Besta and Hoefler, Slim Fly (SC 2014); Kim et al.,
Technology-driven, highly-scalable dragonfly topology (ISCA 2008); Insights into DeepSeek-V3, arXiv 2505.09343, sec. 5
for several planes, each endpoint in one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from moec.errors import InputError, near
from moec.targets.schema import TopologyChoice


class WrongTopology(InputError):
    """A topology that is unknown or cannot be built of such switches."""

    template = "topology {kind!r} of {ports}-port switches: {reason}"


@dataclass(frozen=True)
class Topology:
    """The size of a network at full use of its switches' ports."""

    kind: str
    ports: int
    endpoints: int
    switches: int
    links: int
    """Cables between switches of different groups or layers."""
    local_links: int = 0
    """Cables between switches of one group (dragonfly)."""

    @property
    def all_links(self) -> int:
        """Cables between switches."""
        return self.links + self.local_links

    def price(self, prices: Prices) -> float:
        """Dollars for switches, cables and transceivers."""
        return (
            self.switches * self.ports * prices.port
            + self.links * prices.link
            + self.local_links * prices.local_link
            + self.endpoints * prices.endpoint
        )


@dataclass(frozen=True)
class Prices:
    """Dollars: a switch port, a cable between switches with its ends (inside a group: local), an endpoint's cable.

    The defaults are inferred, not quoted: the published costs of Insights into DeepSeek-V3, arXiv 2505.09343, Table 3,
    are the arithmetic of these four prices (50,000 dollars a 64-port switch) to the printed digits.
    """

    port: float = 781.25
    link: float = 1540.0
    local_link: float = 1462.0
    endpoint: float = 506.0


def fat_tree_2(ports: int) -> Topology:
    """Leaves with half their ports down, half up to as many spines as that reaches; non-blocking."""
    _even("fat-tree-2", ports)
    endpoints = ports * ports // 2
    return Topology("fat-tree-2", ports, endpoints, ports + ports // 2, endpoints)


def fat_tree_3(ports: int) -> Topology:
    """`ports` pods of two layers under a layer of cores; non-blocking."""
    _even("fat-tree-3", ports)
    endpoints = ports**3 // 4
    return Topology("fat-tree-3", ports, endpoints, 5 * ports * ports // 4, 2 * endpoints)


def multi_plane_fat_tree_2(ports: int, planes: int) -> Topology:
    """`planes` separate fat trees of two layers; the devices of a node spread over them by their adapters."""
    if planes < 1:
        raise WrongTopology(kind="multi-plane-fat-tree-2", ports=ports, reason="needs at least one plane")
    one = fat_tree_2(ports)
    sizes = (planes * n for n in (one.endpoints, one.switches, one.links))
    return Topology("multi-plane-fat-tree-2", ports, *sizes)


def slim_fly(ports: int, q: int | None = None) -> Topology:
    """2q^2 switches of network degree (3q - d) / 2, q = 4w + d, d in {-1, 0, 1}; half as many endpoints a switch.

    q: the largest that fits the ports when not given. As in published size comparisons it need not be a prime power,
    which a network that is really built needs.
    """
    fitting = [n for n in range(3, ports) if n % 4 != 2 and sum(_slim_fly_ports(n)) <= ports]
    if q is None and fitting:
        q = fitting[-1]
    if q not in fitting:
        raise WrongTopology(kind="slim-fly", ports=ports, reason=f"q must be one of {fitting or 'none'}")
    degree, down = _slim_fly_ports(q)
    switches = 2 * q * q
    return Topology("slim-fly", ports, switches * down, switches, switches * degree // 2)


def _slim_fly_ports(q: int) -> tuple[int, int]:
    """Ports of a switch to other switches, and to endpoints."""
    delta = {0: 0, 1: 1, 3: -1}[q % 4]
    degree = (3 * q - delta) // 2
    return degree, -(-degree // 2)


def dragonfly(ports: int, groups: int | None = None) -> Topology:
    """Balanced: a quarter of the ports to endpoints, a quarter to other groups, groups fully connected inside.

    groups: every pair joined by a cable limits them to twice the square of a quarter of the ports, plus one.
    """
    quarter = ports // 4
    most = 2 * quarter * quarter + 1
    groups = most if groups is None else groups
    if not 2 <= groups <= most:
        raise WrongTopology(kind="dragonfly", ports=ports, reason=f"{groups} groups; 2 to {most} can be joined")
    inside = 2 * quarter
    switches = groups * inside
    between, local = switches * quarter // 2, groups * inside * (inside - 1) // 2
    return Topology("dragonfly", ports, switches * quarter, switches, between, local)


_BUILDERS: Final[dict[str, Callable[[TopologyChoice], Topology]]] = {
    "fat-tree-2": lambda choice: fat_tree_2(choice.ports),
    "fat-tree-3": lambda choice: fat_tree_3(choice.ports),
    "multi-plane-fat-tree-2": lambda choice: multi_plane_fat_tree_2(choice.ports, choice.planes),
    "slim-fly": lambda choice: slim_fly(choice.ports),
    "dragonfly": lambda choice: dragonfly(choice.ports),
}


def build(choice: TopologyChoice) -> Topology:
    """The full network that a target's file names; WrongTopology when there is no such kind or it cannot be built."""
    if choice.kind not in _BUILDERS:
        raise WrongTopology(kind=choice.kind, ports=choice.ports, reason=f"unknown{near(choice.kind, list(_BUILDERS))}")
    return _BUILDERS[choice.kind](choice)


def _even(kind: str, ports: int) -> None:
    if ports < 4 or ports % 2:
        raise WrongTopology(kind=kind, ports=ports, reason="needs an even number of ports, at least 4")
