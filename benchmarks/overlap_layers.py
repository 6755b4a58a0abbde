"""Schedules of DeepSeek-V3's layers from the target alone, beside the orders and gains that others published.

python benchmarks/overlap_layers.py [--effort 1] [--out results.json]

1. The decode layer on 128 H800 (128 requests a device, context 4096) and the prefill layer on 32 (16,384 tokens a
   device), rows spread evenly as in DeepSeek's profile (deepseek-ai/profile-data): the order found, its bound, and what
   the published order takes with the same durations.
2. Two micro-batches against one on H100: decode on 72 (context 2000, 256 + 32 experts) by tokens a device, prefill on
   32. Published (LMSYS, 96 H100 with SGLang, 2025-05-05): -27 % at 32 tokens a device, break-even between 64 and 128,
   +25.5 % at 256; prefill +27 to +35 % with the same tokens.

Nothing is fitted to these gains. "Hand order" is that of SGLang's two-batch overlap (sgl-project/sglang,
operations_strategy.py), whose kernels run with the SMs that the exchange leaves throughout.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import moec
from moec import targets
from moec.ir import Module
from moec.ir.rewrite import clone_module
from moec.passes.overlap import Overlap
from moec.passes.planning import LayoutRequest
from moec.passes.planning.forms import variants
from moec.passes.planning.layout import resolve
from moec.passes.planning.precision import candidates
from moec.passes.planning.rows import Step
from moec.passes.planning.timing import Setting, step_cost
from moec.passes.scheduling.order import shortest_interval
from moec.passes.streams.costs import Work, split_step
from moec.passes.streams.layer import COMPUTE, LINK, LayerSchedule
from moec.passes.streams.split import split_entry

LAYERS = 58


@dataclass(frozen=True)
class Case:
    """A phase of DeepSeek-V3 on so many devices; balance None: as the planner expects."""

    target: str
    ranks: int
    phase: str
    sequences: int
    context: int
    redundant: int | None = None
    balance: float | None = None

    @property
    def step(self) -> Step:
        """The whole step."""
        return Step(self.phase, self.sequences, 1 if self.phase == "decode" else self.context, self.context)


PROFILE = (
    Case("h800", 128, "decode", 128, 4096, balance=1.0),
    Case("h800-ep32", 32, "prefill", 4, 4096, redundant=32, balance=1.0),
)
GAINS = (
    *(Case("h100", 72, "decode", tokens, 2000, 32) for tokens in (32, 64, 96, 128, 256)),
    Case("h100", 32, "prefill", 4, 4096, 32),
)
PUBLISHED = {("decode", 32): "-27 %", ("decode", 256): "+25.5 %", ("prefill", 4): "+27 to +35 %"}


@dataclass(frozen=True)
class Result:
    """One micro-batch one op after the other, and two scheduled. Microseconds: of a layer, and of the step."""

    layer: LayerSchedule
    serial_us: float
    serial_step_us: float
    rest_us: float

    def gain(self, interval: float) -> float:
        """Tokens per second of the step over those of one micro-batch."""
        return self.serial_step_us / (LAYERS * interval + self.rest_us) - 1


def solve(module: Module, case: Case, effort: float) -> Result:
    """Schedule two micro-batches of a case."""
    target = targets.load(case.target)
    recipe = candidates("auto", target)[0]
    asked = LayoutRequest(ranks=case.ranks, redundant=case.redundant)
    layout, sized = resolve(module, target, recipe, asked)
    setting = Setting(layout, recipe, sized, case.balance)
    form = variants(module, setting)["absorbed" if case.phase == "decode" else "plain"]
    name = f"moe_layers.{case.phase}"
    whole = step_cost(form, case.step, setting)
    serial = sum(op.cost.time_us for op in whole.segments[name]) / LAYERS
    halves = split_step(case.step, 2)
    rest = sum(
        sum(op.cost.time_us for op in ops)
        for half in halves
        for key, ops in step_cost(form, replace(case.step, sequences=half.sequences), setting).segments.items()
        if key != name
    )
    split = clone_module(form)
    split_entry(split, split.functions[case.phase], 2)
    found = Overlap(effort=effort).schedule(split.functions[name], Work(setting, halves))
    assert found is not None
    return Result(found, serial, whole.serial_us, rest)


def hand_orders(found: LayerSchedule, phase: str) -> dict[str, float]:
    """Intervals of the published orders with the same durations, kernels on the SMs that the exchange leaves."""
    graph = found.tasks.graph
    names = set(graph.index)
    runs = {k: [n for n in graph.index if n.endswith(f".{k}")] for k in "01"}

    def pick(k: str, part: str) -> list[str]:
        at = {n: i for i, n in enumerate(runs[k])}
        core = next(i for n, i in at.items() if n.startswith("attn.mla"))
        dispatch = at[f"moe.dispatch.{k}"]
        match part:
            case "attn0":
                return [n for n, i in at.items() if i < core]
            case "attn1":
                return [n for n, i in at.items() if core <= i < dispatch]
            case "shared" | "experts" | "tail":
                word = {"shared": "shared", "experts": "moe.experts", "tail": "add"}[part]
                return [n for n in runs[k] if n.startswith(word)]
        return [n for n in [f"{part.replace('!', f'.{k}:')}"] if n in names]

    def order(text: str) -> list[str]:
        found = []
        for word in text.split():
            part, _, k = word.partition(".")
            lag = ""
            if "@" in k:
                k, _, behind = k.partition("@")
                lag = f"@{behind}"
            k = {"a": "0", "b": "1"}[k]
            part = {"da": "moe.dispatch!send", "db": "moe.dispatch!receive", "ca": "moe.combine!send",
                    "cb": "moe.combine!receive"}.get(part, part)  # fmt: skip
            found += [n + lag for n in pick(k, part)]
        return found

    decode = (
        "da.a shared.a attn0.b db.a experts.a ca.a attn1.b cb.a tail.a "
        "da.b shared.b attn0.a@-1 db.b experts.b ca.b attn1.a@-1 cb.b tail.b"
    )
    sglang = (
        "attn0.a attn1.a da.a attn0.b attn1.b da.b db.a experts.a ca.a db.b experts.b ca.b "
        "shared.a cb.a tail.a shared.b cb.b tail.b"
    )
    deepseek = (
        "attn0.a attn1.a da.a shared.b@1 cb.b@1 tail.b@1 attn0.b attn1.b da.b db.a experts.a ca.a db.b experts.b ca.b "
        "shared.a cb.a tail.a"
    )
    links = ["moe.dispatch.0", "moe.dispatch.1", "moe.combine.0", "moe.combine.1"]
    chosen = {"DeepSeek profile and SGLang": (decode, [links[0], links[2], links[1], links[3]])}
    if phase == "prefill":
        chosen = {"DeepSeek profile": (deepseek, links), "SGLang": (sglang, links)}
    fewest = {t.name: min(range(len(t.modes)), key=lambda i: t.modes[i].share or 0) for t in graph.tasks}
    modes = {t.name: 0 if graph.communicates(t) else fewest[t.name] for t in graph.tasks}
    return {
        name: shortest_interval(graph, modes, {COMPUTE: order(text), LINK: link})
        for name, (text, link) in chosen.items()
    }


def describe(case: Case, result: Result) -> dict[str, Any]:
    """One line of results as plain data."""
    found = result.layer
    hands = hand_orders(found, case.phase)
    return {
        "target": case.target,
        "ranks": case.ranks,
        "phase": case.phase,
        "tokens_per_device": case.step.tokens,
        "one_micro_batch_us": result.serial_us,
        "interval_us": found.interval_us,
        "bound_us": found.bound_us,
        "proven_least": found.solution.optimal,
        "hand_order_us": hands,
        "communication_us": found.communication_us,
        "hidden": 1 - found.exposed_us / found.communication_us,
        "communication_sms": found.sms,
        "gain": result.gain(found.interval_us),
        "gain_hand_order": {name: result.gain(us) for name, us in hands.items()},
        "published_gain": PUBLISHED.get((case.phase, case.sequences), ""),
        "compute_order": found.order(COMPUTE),
        "link_order": found.order(LINK),
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--effort", type=float, default=1.0, help="factor on the scheduler's amount of work")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    module = moec.trace("deepseek-v3").ir
    rows = {"profile": [], "gains": []}  # type: dict[str, list[dict[str, Any]]]
    for case in PROFILE:
        row = describe(case, solve(module, case, options.effort))
        rows["profile"].append(row)
        proven = "proven least" if row["proven_least"] else f"bound {row['bound_us']:.1f}"
        print(f"{case.phase} on {case.ranks} of {case.target}, {row['tokens_per_device']} tokens a device:")
        print(f"  a layer every {row['interval_us']:.1f} us ({proven}); one batch {row['one_micro_batch_us']:.1f} us")
        for name, us in row["hand_order_us"].items():
            print(f"  order of {name}: {us:.1f} us, {us / row['interval_us']:.3f} of it")
        print(f"  {row['hidden']:.1%} of {row['communication_us']:.1f} us communication hidden, SMs for it: "
              f"{row['communication_sms']}")  # fmt: skip
        print(f"  compute: {' '.join(row['compute_order'])}")
        print(f"  link:    {' '.join(row['link_order'])}")
    print(f"\n{'two micro-batches':20} {'tokens':>7} {'one us':>9} {'two us':>9} {'gain':>7} {'by hand':>8}  published")
    for case in GAINS:
        row = describe(case, solve(module, case, options.effort))
        rows["gains"].append(row)
        hand = max(row["gain_hand_order"].items(), key=lambda item: item[0] == "SGLang")
        print(
            f"{case.phase + ' ' + case.target + ' x' + str(case.ranks):20} {row['tokens_per_device']:7}"
            f" {row['one_micro_batch_us']:9.1f} {row['interval_us']:9.1f} {row['gain']:+7.1%} {hand[1]:+8.1%}"
            f"  {row['published_gain']}"
        )
    if options.out is not None:
        beside = options.out.with_name(options.out.name + ".new")
        beside.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(beside, options.out)


if __name__ == "__main__":
    main()
