"""Communication between devices: expert dispatch and combine in both modes, and collectives.

All bandwidths are one way. `sent_bytes` counts what one device sends to others.
"""

from __future__ import annotations

from moec.targets.cost.closed_forms import expected_nodes
from moec.targets.cost.physics import ceildiv, fitted, soft_max
from moec.targets.cost.result import Cost
from moec.targets.schema import Target

_MESSAGE_HEADER = 16


def token_bytes(hidden: int, dtype: str) -> int:
    """Bytes of one token on the wire: FP8 carries a FP32 scale for each 128 elements, and every token a header."""
    if dtype in ("bf16", "f32"):
        return (2 if dtype == "bf16" else 4) * hidden + _MESSAGE_HEADER
    return hidden + 4 * ceildiv(hidden, 128) + _MESSAGE_HEADER


def _need_links(target: Target, ranks: int) -> None:
    """NoLink when `ranks` devices cannot reach each other."""
    if min(ranks, target.node.devices) > 1:
        target.scale_up()
    if ranks > target.node.devices:
        target.scale_out()


def low_latency(
    target: Target, direction: str, tokens: int, hidden: int, top_k: int, experts: int, ep: int, dtype: str
) -> Cost:
    """Point-to-point dispatch or combine: every token goes to each of its experts' devices separately.

    Copies for the same node take the scale-up link, the others each device's own share of the network adapters, at
    the same time. The kernel gives each expert a group of cores, so few experts leave cores idle.
    """
    _need_links(target, ep)
    numbers, node = fitted(target, "low_latency"), target.node
    size = token_bytes(hidden, dtype)
    copies = tokens * top_k
    local_ranks = min(ep, node.devices)
    inside = copies * size * (local_ranks - 1) / ep
    across = copies * size * (ep - local_ranks) / ep
    up = inside / (target.scale_up().bandwidth * numbers["scale_up"]) if inside else 0.0
    out = 0.0
    if across:
        out = across / (node.scale_out_per_device * numbers["scale_out"])
    cores = target.device.cores
    used = ceildiv(experts, ceildiv(experts, cores))
    fed = ceildiv(tokens, used) * numbers[f"{direction}_token"] * hidden / 4096
    issue = numbers[f"{direction}_floor"] + experts * numbers["expert"]
    floor = issue
    if across:
        floor += numbers[f"{direction}_hop"] + (ep - local_ranks) * numbers["peer"]
    busy = soft_max(soft_max(up, out, numbers["norm"]), fed, numbers["norm"])
    parts = {"latency": floor * 1e6, "network": max(up, out) * 1e6, "compute": fed * 1e6}
    # Between nodes the adapters move the data and a hook receives it later: cores only issue and receive. Inside a node
    # the cores copy all the time.
    time = (floor + busy) * 1e6
    sms, cores_us = (0, (issue + fed) * 1e6) if across else (used, time)
    return Cost(time, 0.0, 2.0 * copies * size, inside + across, parts, sms, cores_us)


def normal(target: Target, tokens: int, hidden: int, top_k: int, ep: int, dtype: str, max_nodes: int) -> Cost:
    """High-throughput dispatch or combine: one copy of a token a node, forwarded there over the scale-up link."""
    _need_links(target, ep)
    numbers, node = fitted(target, "normal"), target.node
    size = token_bytes(hidden, dtype)
    nodes = ceildiv(ep, node.devices)
    local_ranks = min(ep, node.devices)
    reached = expected_nodes(nodes, top_k, max_nodes)
    per_node = local_ranks * (1 - (1 - 1 / local_ranks) ** (top_k / reached))
    inside = tokens * size * reached * per_node * (local_ranks - 1) / local_ranks
    across = tokens * size * reached * (nodes - 1) / nodes
    up = inside / (target.scale_up().bandwidth * numbers["scale_up"]) if inside else 0.0
    out, floor = 0.0, numbers["floor"]
    if across:
        out = across / (node.scale_out_per_device * numbers["scale_out"])
        floor += target.scale_out().latency
    time = floor + max(up, out)
    parts = {"latency": floor * 1e6, "network": max(up, out) * 1e6}
    return Cost(time * 1e6, 0.0, 2.0 * (inside + across), inside + across, parts, int(numbers["sms"]))


def send(target: Target, size: int, across: bool) -> Cost:
    """One device to another: over its share of the adapters when `across` nodes, else over the scale-up link."""
    numbers = fitted(target, "collective")
    link = target.scale_out() if across else target.scale_up()
    bandwidth = target.node.scale_out_per_device if across else link.bandwidth
    network = size / (bandwidth * numbers["scale_out" if across else "scale_up"])
    latency = numbers["floor"] + link.latency
    parts = {"latency": latency * 1e6, "network": network * 1e6}
    return Cost((latency + network) * 1e6, 0.0, 2.0 * size, float(size), parts)


def collective(target: Target, op: str, size: int, ranks: int) -> Cost:
    """`all_reduce`, `all_gather`, `reduce_scatter` or `all_to_all` of `size` bytes over `ranks` devices.

    size: the whole buffer of one device: the input of an all-reduce, reduce-scatter or all-to-all, the output of an
    all-gather. Beyond one node the part inside nodes and the part between them follow each other, as in
    hierarchical rings; each device drives its own share of the network adapters.
    """
    if ranks == 1:
        return Cost(0.0)
    _need_links(target, ranks)
    numbers, node = fitted(target, "collective"), target.node
    local = min(ranks, node.devices)
    nodes = ceildiv(ranks, node.devices)
    passes = 2 if op == "all_reduce" else 1
    inside = passes * size * (local - 1) / local
    across = passes * size * (nodes - 1) / nodes / (1 if op == "all_to_all" else local)
    if op == "all_to_all":
        inside, across = size * (local - 1) / ranks, size * (ranks - local) / ranks
    up_link = target.scale_up() if local > 1 else None
    latency = numbers["floor"]
    up = out = 0.0
    if up_link is not None:
        up = inside / (up_link.bandwidth * numbers["scale_up"])
        latency += passes * up_link.latency
    if nodes > 1:
        out = across / (node.scale_out_per_device * numbers["scale_out"])
        latency += passes * target.scale_out().latency * (1 if op == "all_to_all" else (nodes - 1).bit_length())
    network = max(up, out) if op == "all_to_all" else up + out
    parts = {"latency": latency * 1e6, "network": network * 1e6}
    sms = int(numbers["sms"])
    return Cost((latency + network) * 1e6, 0.0, 2.0 * (inside + across), inside + across, parts, sms)
