"""Quality and speed of `moec.passes.placement` beside DeepSeek's greedy balancer and beside lower bounds.

    python benchmarks/placement.py [--small] [--seed N] [--artifact tiny.moec --text FILE] [--out placement.json]

With `--artifact` the loads of a model are recorded too: it is placed by the first half of the text and judged on the
second.

The baseline is written from the description of the published balancer (open-infra "EPLB", 2025): give replicas one by
one to the expert whose replicas are largest; put replicas, largest first, on the least loaded device with a free slot;
with groups that divide over the nodes, first pack groups onto nodes in the same way and then do both inside each node.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.passes.placement import Placement, Problem, Shares, place
from moec.runtime.engine import Engine
from moec.runtime.loads import LoadRecorder

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def greedy_packing(weights: Floats, bins: int) -> Ints:
    """Bin of each of `weights` [items], equally many items a bin: largest first to the lightest bin with room."""
    room = np.full(bins, len(weights) // bins)
    load = np.zeros(bins)
    home = np.empty(len(weights), np.int64)
    for item in np.argsort(-weights, kind="stable"):
        lightest = int(np.where(room > 0, load, np.inf).argmin())
        home[item] = lightest
        load[lightest] += weights[item]
        room[lightest] -= 1
    return home


def greedy_replicas(weights: Floats, slots: int) -> Ints:
    """Expert of each of `slots` replicas: every further one goes to the expert whose replicas are largest."""
    experts = list(range(len(weights)))
    counts = np.ones(len(weights), np.int64)
    while len(experts) < slots:
        largest = int((weights / counts).argmax())
        counts[largest] += 1
        experts.append(largest)
    return np.array(experts)


def greedy_layer(weights: Floats, devices: int, slots: int) -> Ints:
    """Experts in slots [devices, slots per device] for one layer without groups."""
    experts = greedy_replicas(weights, slots)
    counts = np.bincount(experts, minlength=len(weights))
    home = greedy_packing((weights / counts)[experts], devices)
    return experts[np.argsort(home, kind="stable")].reshape(devices, -1)


def greedy(problem: Problem) -> Placement:
    """The published greedy balancer, with even shares."""
    mapping = np.empty((problem.layers, problem.slots), np.int64)
    nodes = problem.nodes if problem.bound_to_nodes else 1
    groups = problem.groups if problem.bound_to_nodes else 1
    size = problem.experts // groups
    for layer, weights in enumerate(problem.loads):
        home = greedy_packing(weights.reshape(groups, size).sum(axis=1), nodes)
        parts = []
        for node in range(nodes):
            mine = (np.flatnonzero(home == node)[:, None] * size + np.arange(size)).ravel()
            parts.append(mine[greedy_layer(weights[mine], problem.devices // nodes, problem.slots // nodes)])
        mapping[layer] = np.concatenate(parts).ravel()
    counts = np.stack([np.bincount(row, minlength=problem.experts) for row in mapping])
    shares = 1.0 / np.take_along_axis(counts, mapping, axis=1)
    return Placement(mapping, shares, problem.experts, problem.devices, problem.nodes)


def skewed(rng: np.random.Generator, layers: int, experts: int, exponent: float) -> Floats:
    """Loads falling with rank to the power of `exponent`, in an order and with noise of each layer's own."""
    ranked = 1.0 / np.arange(1, experts + 1) ** exponent
    order = np.argsort(rng.random((layers, experts)), axis=1)
    return np.asarray(ranked[order] * rng.gamma(20.0, 1 / 20, size=(layers, experts)))


def load_families(rng: np.random.Generator, layers: int, experts: int) -> Iterator[tuple[str, Floats]]:
    """Names and loads [layers, experts]: the skews that routers show, and awkward ones."""
    yield "uniform", rng.poisson(4096, size=(layers, experts)).astype(np.float64)
    for exponent in (0.2, 0.6, 1.0, 1.4):
        yield f"1/rank^{exponent}", skewed(rng, layers, experts, exponent)
    steep = np.linspace(0.2, 1.5, layers)
    yield "skew by layer", np.concatenate([skewed(rng, 1, experts, a) for a in steep])
    group = rng.gamma(2.0, 1.0, size=(layers, 8)).repeat(experts // 8, axis=1)
    yield "correlated groups", skewed(rng, layers, experts, 0.5) * group
    start, end = skewed(rng, 1, experts, 0.8), skewed(rng, 1, experts, 0.8)
    part = np.linspace(0, 1, layers)[:, None]
    yield "drifting", start * (1 - part) + end * part
    idle = skewed(rng, layers, experts, 0.8)
    idle[:, rng.permutation(experts)[: experts // 3]] = 0.0
    yield "a third idle", idle
    hot = np.ones((layers, experts))
    hot[np.arange(layers), rng.integers(experts, size=layers)] = experts / 2
    yield "one hot expert", hot


def partnered(rng: np.random.Generator, loads: Floats, tokens: int, top_k: int) -> tuple[Floats, Floats, Ints]:
    """Routing in which tokens of a topic prefer the topic's experts: loads, co-activation, and choices to test on.

    Topics are random sets of experts; two samples of `tokens` tokens a layer are drawn alike.
    """
    layers, experts = loads.shape
    pairs = np.zeros((layers, experts, experts))
    counts = np.zeros((layers, experts))
    fresh = np.empty((layers, tokens, top_k), np.int64)
    for layer in range(layers):
        topic_of = rng.permutation(experts) % 8
        for sample in range(2):
            topic = rng.integers(8, size=tokens)
            score = np.log(loads[layer]) + 2.0 * (topic[:, None] == topic_of) + rng.gumbel(size=(tokens, experts))
            chosen = np.argsort(-score, axis=1)[:, :top_k]
            if sample:
                fresh[layer] = chosen
            else:
                onehot = np.zeros((tokens, experts), np.float32)
                np.put_along_axis(onehot, chosen, 1.0, axis=1)
                pairs[layer], counts[layer] = onehot.T @ onehot, onehot.sum(axis=0)
    return counts, pairs, fresh


def ratio(greatest: Floats, bound: Floats) -> Floats:
    return np.where(bound > 0, greatest / np.where(bound > 0, bound, 1.0), 1.0)


def measure(problem: Problem, shares: Shares) -> dict[str, Any]:
    """Greatest device load over the lower bound, for the baseline and for moec, and moec's seconds of CPU."""
    start = time.process_time()
    result = place(problem, shares=shares)
    seconds = time.process_time() - start
    baseline = greedy(problem).greatest_loads(problem.loads)
    ours, theirs = ratio(result.greatest, result.bound), ratio(baseline, result.bound)
    return {
        "greedy_mean": theirs.mean(),
        "greedy_worst": theirs.max(),
        "mean": ours.mean(),
        "worst": ours.max(),
        "worse_than_greedy": int((result.greatest > baseline * (1 + 1e-9)).sum()),
        "price_of_groups": result.price_of_groups.mean(),
        "seconds": seconds,
    }


def shapes(small: bool) -> list[tuple[int, int, int, int, Shares]]:
    """Devices, slots a device, devices a node, groups, shares."""
    if small:
        return [
            (8, 9, 8, 1, "even"),
            (16, 5, 8, 1, "even"),
            (36, 2, 36, 1, "even"),
            (8, 9, 2, 8, "even"),
            (16, 5, 8, 1, "free"),
        ]
    return [
        (32, 9, 8, 1, "even"),
        (64, 5, 8, 1, "even"),
        (144, 2, 8, 1, "even"),
        (320, 1, 8, 1, "even"),
        (32, 9, 8, 8, "even"),
        (32, 9, 8, 1, "free"),
        (64, 5, 8, 1, "free"),
    ]


def run_balance(small: bool, seed: int, show: Callable[[str], None]) -> list[dict[str, Any]]:
    layers, experts = (6, 64) if small else (58, 256)
    show(f"{layers} layers, {experts} experts; greatest device load / lower bound: mean of layers (worst)")
    show(f"{'devices x slots':28} {'loads':18} {'greedy':>16} {'moec':>18} {'worse':>5} {'price':>6} {'s':>5}")
    rows = []
    for devices, slots, per_node, groups, shares in shapes(small):
        name = f"{devices} x {slots}" + (f", {groups} groups" if groups > 1 else "") + (", free" * (shares == "free"))
        for family, loads in load_families(np.random.default_rng(seed), layers, experts):
            problem = Problem.of(
                loads, devices=devices, slots_per_device=slots, devices_per_node=per_node, groups=groups
            )
            row = measure(problem, shares)
            rows.append({"shape": name, "loads": family} | row)
            show(
                f"{name:28} {family:18} {row['greedy_mean']:7.4f} ({row['greedy_worst']:.4f}) "
                f"{row['mean']:8.5f} ({row['worst']:.5f}) {row['worse_than_greedy']:5d} "
                f"{row['price_of_groups']:6.3f} {row['seconds']:5.2f}"
            )
    return rows


def run_v3_traffic(seed: int, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """DeepSeek-V3's layout of arXiv 2505.09343, sec. 4.3: copies of a token beside what arithmetic says.

    8 nodes x 8 devices x 4 experts, 8 of 256 experts a token, alike in demand. Without limits a token visits
    8 (1 - C(224, 8) / C(256, 8)) nodes on average, with one group a node and 4 groups a token at most 4.
    """
    from math import comb

    from moec.passes.placement.traffic import routed_traffic, sample_routing

    rng = np.random.default_rng(seed)
    show("DeepSeek-V3 on 8 nodes: copies of a token, the one that stays on its node included")
    rows = []
    for limited in (False, True):
        chosen = sample_routing(rng, np.ones(256), 40000, 8, 8 if limited else 1, 4)
        problem = Problem.of(
            np.ones((1, 256)), devices=64, slots_per_device=4, devices_per_node=8, groups=8 if limited else 1
        )
        placement = place(problem).placement
        node = placement.physical_to_logical_map[0].argsort()[chosen] // 32
        most = max(len(set(row)) for row in node.tolist())
        traffic = routed_traffic(rng, placement, chosen[None])
        direct, forwarded = traffic.direct.sum(), traffic.forwarded.sum()
        says = "at most 4" if limited else f"{8 * (1 - comb(224, 8) / comb(256, 8)):.4f} on average"
        show(
            f"{'node-limited' if limited else 'any experts':14} without forwarding {direct:.4f} (8), with "
            f"{forwarded:.4f}, at most {most} ({says}); between nodes {traffic.copies_direct:.4f} and "
            f"{traffic.copies_forwarded:.4f}"
        )
        rows.append({"limited": limited, "direct": direct, "forwarded": forwarded, "most": most})
    return rows


def run_traffic(small: bool, seed: int, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Copies between nodes for fresh tokens of the same topics, with placements that know and do not know the pairs."""
    from moec.passes.placement.traffic import routed_traffic

    layers, experts, devices, slots = (2, 64, 8, 9) if small else (8, 256, 32, 9)
    rng = np.random.default_rng(seed)
    loads, pairs, fresh = partnered(rng, skewed(rng, layers, experts, 0.5), 4096, 8)
    problem = Problem.of(loads, devices=devices, slots_per_device=slots, devices_per_node=devices // 4)
    show("copies of a token between 4 nodes, per layer, for tokens not seen before")
    rows = []
    for slack in (None, 0.0, 0.002, 0.01, 0.05):
        start = time.perf_counter()
        result = place(problem, coactivation=None if slack is None else pairs, slack=slack or 0.0)
        seconds = time.perf_counter() - start
        traffic = routed_traffic(np.random.default_rng(0), result.placement, fresh)
        name = "balance alone" if slack is None else f"co-activation, slack {slack:g}"
        show(
            f"{name:28} without forwarding {traffic.copies_direct:.3f}, with {traffic.copies_forwarded:.3f}; "
            f"balance {result.balance.mean():.4f} ({result.balance.max():.4f}), {seconds:.1f} s"
        )
        rows.append(
            {
                "placement": name,
                "direct": traffic.copies_direct,
                "forwarded": traffic.copies_forwarded,
                "balance": result.balance.mean(),
            }
        )
    return rows


def recorded_choices(artifact: Path, text: Path) -> Ints:
    """Experts that a compiled model's routers choose for the tokens of a text: int64[layers, tokens, top_k]."""
    import moec

    class Keeping(LoadRecorder):
        """Keeps the choices themselves."""

        def add(self, ids: NDArray[Any]) -> None:
            kept.append(ids.copy())

    kept: list[NDArray[Any]] = []
    model = moec.load(artifact, threads=1)
    model.record_loads()
    assert isinstance(model.engine, Engine) and model.engine.recorder is not None
    model.engine.recorder = Keeping(model.engine.recorder.layers, model.engine.recorder.experts)
    tokens = np.asarray(model.tokenizer.encode(text.read_text(encoding="utf-8")))
    for begin in range(0, len(tokens), model.context):
        model.logits(tokens[None, begin : begin + model.context])
    return np.asarray(np.concatenate(kept, axis=1), dtype=np.int64)


def counted(choices: Ints, experts: int) -> tuple[Floats, Floats]:
    """Loads [layers, experts] and co-activation [layers, experts, experts] of choices."""
    chosen = np.zeros((*choices.shape[:2], experts), np.float32)
    np.put_along_axis(chosen, choices, 1.0, axis=2)
    return chosen.sum(axis=1, dtype=np.float64), np.einsum("lte,ltf->lef", chosen, chosen).astype(np.float64)


def run_recorded(artifact: Path, text: Path, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Balance and traffic of placements made for half of a text: on that half, and on the other."""
    from moec.passes.placement.traffic import routed_traffic

    choices = recorded_choices(artifact, text)
    experts, half = int(choices.max()) + 1, choices.shape[1] // 2
    loads, pairs = counted(choices[:, :half], experts)
    fresh = counted(choices[:, half:], experts)[0]
    show(f"loads of {artifact.name}: {len(loads)} layers, {experts} experts, {half} tokens to place by, as many unseen")
    rows = []
    for devices, slots, nodes in ((4, 5, 2), (8, 3, 2), (8, 3, 4), (8, 4, 4), (12, 2, 4)):
        problem = Problem.of(loads, devices=devices, slots_per_device=slots, devices_per_node=devices // nodes)
        published = greedy(problem)
        for name, slack in (("greedy", None), ("balance", None), ("pairs", 0.002), ("pairs", 0.02), ("pairs", 0.1)):
            result = place(problem, coactivation=pairs if slack is not None else None, slack=slack or 0.0)
            placement = published if name == "greedy" else result.placement
            traffic = routed_traffic(np.random.default_rng(0), placement, choices[:, half:])
            now, then = (ratio(placement.greatest_loads(x), x.sum(axis=1) / devices).mean() for x in (loads, fresh))
            bound = ratio(placement.greatest_loads(loads), result.bound)
            label = name if slack is None else f"{name}, slack {slack:g}"
            show(
                f"{devices} x {slots} on {nodes} nodes  {label:17} over bound {bound.mean():.4f} ({bound.max():.4f}); "
                f"over the mean {now:.4f}, unseen {then:.4f}; copies between nodes {traffic.copies_direct:.3f}, "
                f"forwarded {traffic.copies_forwarded:.3f}"
            )
            rows.append(
                {"shape": [devices, slots, nodes], "placement": label, "bound": bound.mean(), "over_mean": now,
                 "unseen": then, "direct": traffic.copies_direct, "forwarded": traffic.copies_forwarded}
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Placement beside the published greedy balancer and lower bounds.")
    parser.add_argument("--small", action="store_true", help="a few layers and experts, for a quick check")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-traffic", action="store_true", help="copies between nodes, nothing else")
    parser.add_argument("--artifact", type=Path, help="a CPU artifact whose loads are recorded")
    parser.add_argument("--text", type=Path, help="with --artifact: the text it reads")
    parser.add_argument("--only-recorded", action="store_true", help="with --artifact: nothing else")
    parser.add_argument("--out", type=Path, default=Path("placement-benchmark.json"), help="where the figures go")
    options = parser.parse_args()

    def show(line: str) -> None:
        print(line, flush=True)

    if (options.artifact is None) != (options.text is None):
        parser.error("give --artifact and --text together")
    figures: dict[str, Any] = {}
    if options.artifact is not None:
        figures["recorded"] = run_recorded(options.artifact, options.text, show)
    if not options.only_recorded:
        if not options.only_traffic:
            figures["balance"] = run_balance(options.small, options.seed, show)
        figures["v3_traffic"] = run_v3_traffic(options.seed, show)
        figures["traffic"] = run_traffic(options.small, options.seed, show)
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    show(f"wrote {options.out}")


if __name__ == "__main__":
    main()
