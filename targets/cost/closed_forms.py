"""Closed forms of the field's papers: sizes and bounds that need no calibration. Model numbers are plain arguments."""

from __future__ import annotations

from dataclasses import dataclass


def mla_cache_bytes(layers: int, kv_rank: int, rope: int, element_bytes: float = 2) -> float:
    """Bytes of latent cache for one token (Insights into DeepSeek-V3, arXiv 2505.09343, Table 1)."""
    return (kv_rank + rope) * layers * element_bytes


def gqa_cache_bytes(layers: int, kv_heads: int, head: int, element_bytes: float = 2) -> float:
    """Bytes of keys and values for one token of grouped-query attention (same table)."""
    return 2 * kv_heads * head * layers * element_bytes


@dataclass(frozen=True)
class SpeedLimit:
    """The communication bound on decoding: seconds for one exchange, one layer, one token; tokens/s of one request."""

    exchange: float
    layer: float
    token: float

    @property
    def tokens_per_s(self) -> float:
        """The reciprocal of the time per output token."""
        return 1 / self.token


def speed_limit(
    bandwidth: float,
    hidden: int,
    layers: int,
    tokens: int,
    fan_out: int,
    dispatch_bytes: float = 1,
    combine_bytes: float = 2,
) -> SpeedLimit:
    """Decode bound by dispatch and combine alone, with computation hidden behind them by two micro-batches.

    One expert a device, `tokens` per device and micro-batch, each sent to `fan_out` experts (routed and shared), no
    latency; `layers` counts MoE layers. bandwidth: bytes/s, one way. (arXiv 2505.09343, sec. 2.3.2.)
    """
    exchange = (dispatch_bytes + combine_bytes) * tokens * fan_out * hidden / bandwidth
    layer = 2 * exchange
    return SpeedLimit(exchange, layer, layer * layers)


def published_speed_limit(bandwidth: float) -> SpeedLimit:
    """The bound with the assumptions of arXiv 2505.09343, sec. 2.3.2: hidden 7000 ("7K"), all 61 layers MoE, 9 experts.

    DeepSeek-V3 itself has hidden 7168 and 58 MoE layers: `speed_limit` takes them as they are.
    """
    return speed_limit(bandwidth, hidden=7000, layers=61, tokens=32, fan_out=9)


@dataclass(frozen=True)
class RoutedTraffic:
    """Copies of one token that cross the scale-out link, on average over uniform routing."""

    without_forwarding: float
    """One for each expert that lies on another node."""
    with_forwarding: float
    """One for each other node that holds a chosen expert."""
    at_most: int
    """The bound that node-limited routing gives, in nodes."""


def expected_nodes(nodes: int, top_k: int, limit: int) -> float:
    """Expected number of distinct nodes among `top_k` uniform choices of experts, at most `limit` of them allowed.

    With node-limited routing the top-k fall uniformly on `limit` chosen nodes (DeepSeek-V3 technical report,
    arXiv 2412.19437, sec. 2.1.2).
    """
    among = min(nodes, limit)
    return among * (1 - (1 - 1 / among) ** top_k)


def routed_traffic(nodes: int, top_k: int, node_limit: int) -> RoutedTraffic:
    """Scale-out traffic of one token, in copies, with experts spread evenly over `nodes` (arXiv 2505.09343, sec. 4.3).

    A token's `top_k` experts fall uniformly on `node_limit` of the nodes, itself chosen uniformly; copies to the
    token's own node do not cross.
    """
    elsewhere = (nodes - 1) / nodes
    reached = expected_nodes(nodes, top_k, node_limit)
    return RoutedTraffic(top_k * elsewhere, reached * elsewhere, min(nodes, node_limit))


def free_experts(scale_up: float, scale_out: float, node_limit: int) -> float:
    """Experts of a token at the price of `node_limit` scale-out copies: each node forwards scale_up / scale_out more.

    (DeepSeek-V3 technical report, arXiv 2412.19437, sec. 3.2.2: 160 and 50 GB/s give 3.2 a node, 13 in all.)
    """
    return node_limit * scale_up / scale_out


def training_flops_per_token(
    active_parameters: float,
    embedding_parameters: float,
    layers: int,
    heads: int,
    key: int,
    value: int,
    sequence: int,
    causal: bool = True,
) -> float:
    """FLOPs of forward and backward for one token: 6 for each active parameter but the embedding table, plus attention.

    active_parameters: those that one token uses, the embedding table included; embedding_parameters: of the input
    look-up, which multiplies nothing. Attention: scores over `key` and sums over `value` elements a head, three times
    (forward, and twice in backward), over half of `sequence` when causal. Figures published without the causal half
    or with the embedding counted differ (arXiv 2505.09343, Table 2).
    """
    attended = sequence / 2 if causal else float(sequence)
    attention = 3 * 2 * layers * heads * (key + value) * attended
    return 6 * (active_parameters - embedding_parameters) + attention


def mfu(tokens_per_s: float, flops_per_token: float, devices: int, peak: float) -> float:
    """Model FLOPs utilisation: useful training FLOP/s over the devices' dense peak."""
    return tokens_per_s * flops_per_token / (devices * peak)
