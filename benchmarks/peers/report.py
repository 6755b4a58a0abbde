"""The result of a comparison: medians over rounds, ratios, bounds; as JSON, a table and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from moec.model_defs.deepseek_v3.config import Config
from peers import geometry
from peers.limits import Limits
from peers.registry import PEERS
from peers.worker import Measured


@dataclass(frozen=True)
class Rate:
    """Tokens a second: median over rounds, every round, what the machine allows.

    `first_over_this`: the first peer's rate over this one's, median over the pairs of a round.
    `bound` of a decode step adds the read of its weights and the greater of its attention's bytes and operations;
    of a prompt it is operations alone.
    """

    median: float
    rounds: list[float]
    bound: float
    share_of_bound: float
    first_over_this: float


@dataclass(frozen=True)
class Row:
    """One peer. `step_weight_bytes`: bytes of weights that a decode step reads at least, of its storage format."""

    title: str
    step_weight_bytes: float
    prefill: dict[int, Rate]
    decode: dict[int, Rate]
    batched: dict[int, Rate]
    load_s: float
    first_token_s: float
    peak_memory: int


def rows(c: Config, limits: Limits, measured: dict[str, list[Measured]]) -> dict[str, Row]:
    """A row for each peer with its rounds; the ratios are to the first one."""
    out: dict[str, Row] = {}
    for name, runs in measured.items():
        first = next(iter(out.values()), None)
        bytes_read = geometry.step_bytes(c, PEERS[name].bytes_per_weight, PEERS[name].bytes_per_expert_weight)
        prefill, decode = {}, {}
        for tokens in runs[0].prefill:
            bound = limits.peak * tokens / geometry.prefill_operations(c, tokens)
            prefill[tokens] = _rate([r.prefill[tokens] for r in runs], bound, first.prefill[tokens] if first else None)
        for tokens in runs[0].decode:
            cache, operations = geometry.attention_step(c, tokens, PEERS[name].cache_element)
            seconds = bytes_read / limits.bandwidth + max(cache / limits.bandwidth, operations / limits.peak)
            decode[tokens] = _rate(
                [r.decode[tokens] for r in runs], 1 / seconds, first.decode[tokens] if first else None
            )
        batched = {}
        for batch in runs[0].batched:
            tokens = next(iter(runs[0].decode))
            cache, operations = geometry.attention_step(c, tokens, PEERS[name].cache_element)
            read = geometry.step_bytes(c, PEERS[name].bytes_per_weight, PEERS[name].bytes_per_expert_weight, batch)
            seconds = read / limits.bandwidth + batch * max(cache / limits.bandwidth, operations / limits.peak)
            batched[batch] = _rate(
                [r.batched[batch] for r in runs], batch / seconds, first.batched[batch] if first else None
            )
        out[name] = Row(
            title=PEERS[name].title,
            step_weight_bytes=bytes_read,
            prefill=prefill,
            decode=decode,
            batched=batched,
            load_s=median(r.load_s for r in runs),
            first_token_s=median(r.first_token_s for r in runs),
            peak_memory=max(r.peak_memory for r in runs),
        )
    return out


def _rate(runs: list[float], bound: float, first: Rate | None) -> Rate:
    middle = median(runs)
    # Pairs of one round: what else the machine does changes between rounds, less within one.
    ratio = median(a / b for a, b in zip(first.rounds, runs, strict=True)) if first else 1.0
    return Rate(middle, runs, bound, middle / bound, ratio)


def as_json(facts: dict[str, Any], limits: Limits, found: dict[str, Row]) -> dict[str, Any]:
    """Everything, for a file."""
    return {**facts, "limits": asdict(limits), "peers": {name: asdict(row) for name, row in found.items()}}


def table(limits: Limits, found: dict[str, Row]) -> str:
    """Lines of text: a block for each prompt length and context, then start and memory."""
    first = next(iter(found.values()))
    gbps, gflops = limits.bandwidth / 1e9, limits.peak / 1e9
    tiles = f", of matrix tiles in BF16 {limits.tiles / 1e9:,.0f}" if limits.tiles else ""
    lines = [
        f"{limits.threads} threads; measured: read bandwidth {gbps:.1f} GB/s, FMA peak {gflops:.0f} GFLOP/s{tiles}"
    ]
    titles = {"prefill": "prefill of {} tokens", "decode": "decode at context {}", "batched": "decode, batch of {}"}
    for phase, title in titles.items():
        for size in getattr(first, phase):
            what = title.format(size)
            lines += [
                "",
                f"{what:27} {'tokens/s':>9} {'least':>8} {'most':>8} {'bound':>8} {'of bound':>9} {'ratio':>6}",
            ]
            for row in found.values():
                r = getattr(row, phase)[size]
                lines.append(
                    f"{row.title:27} {r.median:9.2f} {min(r.rounds):8.2f} {max(r.rounds):8.2f} {r.bound:8.1f} "
                    f"{r.share_of_bound:9.0%} {r.first_over_this:6.2f}"
                )
    lines += ["", f"{'':27} {'load s':>9} {'first token s':>14} {'peak MiB':>9} {'MB of weights a step':>21}"]
    for row in found.values():
        lines.append(
            f"{row.title:27} {row.load_s:9.2f} {row.first_token_s:14.2f} {row.peak_memory / 2**20:9,.0f} "
            f"{row.step_weight_bytes / 1e6:21,.0f}"
        )
    return "\n".join([*lines, "", f"ratio: the rate of {first.title} over this one's, median over rounds"])


def plot(path: Path, found: dict[str, Row]) -> None:
    """Bars of the medians with every round and the bounds, one panel a prompt length or context."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    first = next(iter(found.values()))
    panels = [(phase, n) for phase in ("prefill", "decode", "batched") for n in getattr(first, phase)]
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axes, (phase, size) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rates = [getattr(row, phase)[size] for row in found.values()]
        places = range(len(rates))
        axes.barh(places, [r.median for r in rates], tick_label=[row.title for row in found.values()])
        for i, r in enumerate(rates):
            axes.plot(r.rounds, [i] * len(r.rounds), "k.", markersize=3)
            axes.plot([r.bound] * 2, [i - 0.4, i + 0.4], "r-")
        axes.invert_yaxis()
        axes.set_title(f"decode, batch of {size}" if phase == "batched" else f"{phase}, {size} tokens")
        axes.set_xlabel("tokens/s (red: bound)")
    figure.savefig(path)
