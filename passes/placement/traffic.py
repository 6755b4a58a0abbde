"""Copies of tokens that cross between nodes, with and without forwarding inside the receiving node.

Without forwarding a token is sent to each of its k experts' devices: k copies. With forwarding it is sent once to each
node that holds any of them, and the scale-up link spreads it there: as many copies as distinct nodes, M. With
node-limited routing M is at most the number of groups a token may use (4 of 8 in DeepSeek-V3, whose k is 8): "Insights
into DeepSeek-V3", arXiv 2505.09343, sec. 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moec.passes.placement.placement import Placement
from moec.passes.placement.problem import Floats, Ints


@dataclass(frozen=True)
class Traffic:
    """Copies per token that each node receives; float64[layers, nodes].

    `direct` counts one copy for each chosen expert, `forwarded` one for each visited node. Tokens start evenly on all
    nodes, so a part 1 / nodes of each figure stays on its node; `between` spreads the rest over pairs of nodes.
    """

    direct: Floats
    forwarded: Floats

    @property
    def copies_direct(self) -> float:
        """Copies of a token between nodes without forwarding, mean over layers."""
        return self._remote(self.direct)

    @property
    def copies_forwarded(self) -> float:
        """Copies of a token between nodes with forwarding, mean over layers."""
        return self._remote(self.forwarded)

    def between(self, *, forwarding: bool) -> Floats:
        """Copies per token from each node (row) to each other node (column), mean over layers."""
        received = (self.forwarded if forwarding else self.direct).mean(axis=0)
        nodes = len(received)
        pairs = np.repeat(received[None, :] / nodes, nodes, axis=0)
        np.fill_diagonal(pairs, 0.0)
        return pairs

    @staticmethod
    def _remote(received: Floats) -> float:
        nodes = received.shape[1]
        return float(received.sum(axis=1).mean() * (nodes - 1) / nodes)


def sample_routing(
    rng: np.random.Generator, loads: Floats, tokens: int, top_k: int, groups: int = 1, top_groups: int = 1
) -> Ints:
    """Expert choices of `tokens` tokens for one layer with loads [experts]; int64[tokens, top_k].

    Experts are drawn without replacement with probability proportional to their load. With `groups` > 1 a token first
    keeps the `top_groups` groups whose two best experts score highest, as DeepSeek-V3's router does.
    """
    score = np.log(np.maximum(loads, loads.max() * 1e-9 + np.finfo(np.float64).tiny)) + rng.gumbel(
        size=(tokens, len(loads))
    )
    if groups > 1:
        grouped = score.reshape(tokens, groups, -1)
        best_two = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        dropped = np.argsort(-best_two, axis=1, kind="stable")[:, top_groups:]
        np.put_along_axis(grouped, dropped[:, :, None], -np.inf, axis=1)
    return np.argsort(-score, axis=1, kind="stable")[:, :top_k]


def routed_traffic(rng: np.random.Generator, placement: Placement, routing: Ints) -> Traffic:
    """Exact counts for choices int64[layers, tokens, top_k], recorded or sampled; replicas drawn by their shares."""
    nodes = placement.nodes
    direct = np.zeros((placement.layers, nodes))
    forwarded = np.zeros((placement.layers, nodes))
    for layer in range(placement.layers):
        node = _draw_slots(rng, placement, layer, routing[layer]) // (placement.slots // nodes)
        visits = np.stack([(node == n).sum(axis=1) for n in range(nodes)], axis=1)
        direct[layer] = visits.mean(axis=0)
        forwarded[layer] = (visits > 0).mean(axis=0)
    return Traffic(direct, forwarded)


def _draw_slots(rng: np.random.Generator, placement: Placement, layer: int, routing: Ints) -> Ints:
    """A slot for every choice, drawn by the shares of the replicas."""
    mapping, shares = placement.physical_to_logical_map[layer], placement.replica_shares[layer]
    order = np.argsort(mapping, kind="stable")
    # The slots sorted by expert tile the line [0, experts): expert e owns the interval from e to e + 1.
    reach = shares[order].cumsum()
    at = np.searchsorted(reach, routing + rng.random(routing.shape) * (1 - 1e-9), side="right")
    return np.asarray(order[np.minimum(at, len(order) - 1)])


def paired_traffic(placement: Placement, loads: Floats, coactivation: Floats, top_k: int) -> tuple[Traffic, Traffic]:
    """Least and greatest traffic that loads and co-activation allow.

    The number K of a token's experts on a node has known E[K] (from the loads) and E[K (K - 1)] (from the pairs).
    P(K >= 1) then lies between Dawson and Sankoff's bound and E[K] - E[K (K - 1)] / top_k; both are sharp.
    """
    tokens = np.maximum(loads.sum(axis=1) / top_k, np.finfo(np.float64).tiny)[:, None]
    by_node = placement.slot_loads(loads).reshape(placement.layers, placement.nodes, -1)
    single = by_node.sum(axis=2) / tokens
    paired = _pairs_on_node(placement, coactivation) / tokens
    typical = np.floor(2 * paired / np.where(single > 0, single, 1.0)) + 1
    least = 2 * single / (typical + 1) - 2 * paired / (typical * (typical + 1))
    most = np.minimum(single - 2 * paired / top_k, 1.0)
    least = np.clip(least, 0.0, 1.0)
    return Traffic(single, least), Traffic(single, np.maximum(most, least))


def _pairs_on_node(placement: Placement, coactivation: Floats) -> Floats:
    """Co-activated unordered pairs served on each node; float64[layers, nodes]."""
    pairs = np.zeros((placement.layers, placement.nodes))
    per_node = placement.slots // placement.nodes
    for layer in range(placement.layers):
        for node in range(placement.nodes):
            here = slice(node * per_node, (node + 1) * per_node)
            share = np.bincount(
                placement.physical_to_logical_map[layer, here],
                weights=placement.replica_shares[layer, here],
                minlength=placement.experts,
            )
            both = share @ coactivation[layer] @ share - (share**2 * np.diagonal(coactivation[layer])).sum()
            pairs[layer, node] = both / 2
    return pairs
