"""Predicts published serving systems with the planner and prints them beside what was published. Nothing is fitted.

    python benchmarks/published_systems.py [--json OUT.json]

A row is a system, its workload, and tokens/s of a node as its operators published it. `profile` rows come from traces
of full batches, `service` rows from days of production, with queues, cache look-ups and uneven requests, which the
planner does not know; `benchmark` rows from synthetic load.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import moec
from moec import targets
from moec.ir import Module
from moec.passes.planning import LayoutRequest, Options, make_plan

DAY6 = "DeepSeek open-infra-index, day 6"
PROFILE = "deepseek-ai/profile-data, rates as compared by LMSYS, 2025-05-05"
LMSYS = "LMSYS, 96 H100 with SGLang, 2025-05-05"
KIMI = "LMSYS, Kimi K2 on 128 H200, 2025-07-20"
GB200_1 = "LMSYS, DeepSeek on GB200 NVL72, part 1, 2025-06-16"
GB200_2 = "LMSYS, DeepSeek on GB200 NVL72, part 2, 2025-09-25"
PERFECT = 1.0


@dataclass(frozen=True)
class System:
    """One published number: tokens/s of a node in one phase; of a device where `per` says so."""

    name: str
    kind: str
    phase: str
    target: str
    ranks: int
    published: float
    source: str
    batch: int = 128
    context: int = 4096
    prompt: int = 4096
    chunk: int = 16384
    redundant: int | None = None
    balance: float | None = None
    overlap: str = "auto"
    model: str = "deepseek-v3"
    per: str = "node"


def _sglang(name: str, phase: str, published: float, **workload: Any) -> System:
    ranks = 32 if phase == "prefill" else 72
    return System(f"SGLang {name}", "benchmark", phase, "h100", ranks, published, LMSYS, redundant=32, **workload)


SYSTEMS = (
    System("DeepSeek decode EP144", "service", "decode", "h800-ep144", 144, 14_800, DAY6, context=4989),
    System("DeepSeek decode EP128", "profile", "decode", "h800", 128, 18_598, PROFILE, balance=PERFECT),
    System("DeepSeek prefill EP32", "service", "prefill", "h800-ep32", 32, 32_207, DAY6, redundant=32),
    System(
        "DeepSeek prefill EP32", "profile", "prefill", "h800-ep32", 32, 62_713, PROFILE, redundant=32, balance=PERFECT
    ),
    _sglang("prefill 1K", "prefill", 57_674, prompt=1024),
    _sglang("prefill 2K", "prefill", 54_543, prompt=2048),
    _sglang("prefill 4K", "prefill", 50_302, prompt=4096),
    _sglang("prefill 4K, perfect balance", "prefill", 59_337, prompt=4096, balance=PERFECT),
    _sglang("decode", "decode", 22_282, batch=256, context=2000),
    _sglang("decode without overlap", "decode", 22_310 / 1.255, batch=256, context=2000, overlap="off"),
    System(
        "Kimi K2 prefill", "benchmark", "prefill", "h200", 32, 56_000, KIMI, prompt=2000, redundant=0, model="kimi-k2"
    ),
    System(
        "Kimi K2 decode",
        "benchmark",
        "decode",
        "h200",
        96,
        24_000,
        KIMI,
        batch=480,
        context=2050,
        redundant=96,
        model="kimi-k2",
    ),
    System(
        "GB200 decode, BF16 + FP8, 2025-06",
        "benchmark",
        "decode",
        "gb200-nvl72",
        48,
        7_583,
        GB200_1,
        batch=768,
        context=2050,
        redundant=32,
        per="device",
    ),
    System(
        "GB200 decode, BF16 + FP8, 2025-09",
        "benchmark",
        "decode",
        "gb200-nvl72",
        48,
        9_087,
        GB200_2,
        batch=1408,
        context=2050,
        redundant=32,
        per="device",
    ),
    System(
        "GB200 prefill, BF16 + FP8, 2025-09",
        "benchmark",
        "prefill",
        "gb200-nvl72",
        4,
        18_471,
        GB200_2,
        prompt=2000,
        redundant=32,
        per="device",
    ),
)


def predict(system: System, module: Module) -> dict[str, Any]:
    """The planner's tokens/s of a node with and without overlap, and the ratio of the first to the published."""
    options = Options(
        batch=system.batch,
        context=system.context,
        prompt=system.prompt,
        chunk=system.chunk,
        layout=LayoutRequest(ranks=system.ranks, redundant=system.redundant),
        balance=system.balance,
        overlap=system.overlap,
    )
    target = targets.load(system.target)
    phase = make_plan(module, target, options).phases[system.phase]
    serial = make_plan(module, target, replace(options, overlap="off")).phases[system.phase]
    predicted, without = (p.per_node if system.per == "node" else p.per_device for p in (phase, serial))
    return {
        **asdict(system),
        "predicted": predicted,
        "without_overlap": without,
        "ratio": predicted / system.published,
        "overlapped": phase.overlapped,
        "bound": phase.bound,
        "step_ms": phase.step_us / 1e3,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows as JSON")
    out: Path | None = parser.parse_args(arguments).json
    modules = {name: moec.trace(name).ir for name in dict.fromkeys(system.model for system in SYSTEMS)}
    rows = [predict(system, modules[system.model]) for system in SYSTEMS]
    heads = ("tokens/s of a node", "kind", "published", "predicted", "ratio", "no overlap")
    print("{:36} {:10} {:>9} {:>9} {:>6} {:>10}  bound".format(*heads))
    for row in rows:
        line = (
            f"{row['name']:36} {row['kind']:10} {row['published']:9,.0f} {row['predicted']:9,.0f} {row['ratio']:6.2f}"
        )
        print(f"{line} {row['without_overlap']:10,.0f}  {row['bound']}")
    if out is not None:
        beside = out.with_name(out.name + ".new")
        beside.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        os.replace(beside, out)


if __name__ == "__main__":
    main()
