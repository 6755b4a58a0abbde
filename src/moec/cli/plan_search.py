"""`moec plan --search`: the layouts of a number of devices, ranked."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING

from moec.cli.options import UsageError
from moec.cli.plan_tables import layout_text, size_text

if TYPE_CHECKING:
    from moec.ir import Module
    from moec.passes.planning import Candidate, Found, Options
    from moec.targets import Target

_SHOWN = 10


def run_search(
    model: str,
    module: Module,
    targets: list[Target],
    options: Options,
    phase: str,
    limit_ms: float | None,
    as_json: bool,
) -> None:
    """Search one target and print the ranking and the Pareto front; raises UsageError, NothingFits."""
    from moec.passes.planning import search, search_json

    if len(targets) > 1:
        raise UsageError(message="--search takes one target at a time")
    if limit_ms is not None and not 0 < limit_ms < math.inf:
        raise UsageError(message=f"the limit on the time of a token must be positive, got {limit_ms:g} ms")
    began = time.perf_counter()
    found = search(module, targets[0], options, phase, math.inf if limit_ms is None else limit_ms * 1e3)
    seconds = time.perf_counter() - began
    if as_json:
        print(json.dumps(search_json(found, targets[0].name, phase, seconds), allow_nan=False))
        return
    limit = "" if limit_ms is None else f", at most {limit_ms:g} ms"
    what = f"context {options.context}" if phase == "decode" else f"prompts of {options.prompt}"
    print(f"{model} on {targets[0].name}: {phase} at {what}{limit}")
    print(f"{found.layouts} layouts whose weights fit, {found.tried} evaluations in {seconds:.1f} s\n")
    print(f"  {'':4} {'batch':>6} {'ms':>8} {'tokens/s a device':>18} {'a node':>9} {'memory':>9}  layout")
    for rank, candidate in enumerate(found.ranking[:_SHOWN], 1):
        print(f"  {rank:3}. {_line(candidate, targets[0])}")
    print("\nPareto front of time and rate:")
    for candidate in found.front:
        print(f"       {_line(candidate, targets[0])}")
    print("\n" + _asked(found, targets[0]))


def _line(found: Candidate, target: Target) -> str:
    node = found.per_device * min(found.layout.ranks, target.node.devices)
    pair = ", two micro-batches" if found.overlapped else ""
    numbers = f"{found.batch:6} {found.time_us / 1e3:8.2f} {found.per_device:18,.1f} {node:9,.0f}"
    return f"{numbers} {size_text(found.memory.total):>9}  {layout_text(found.layout)}{pair}"


def _asked(found: Found, target: Target) -> str:
    if found.rank is None:
        return "the layout asked for is not feasible within these limits"
    own, best = found.ranking[found.rank - 1], found.ranking[0]
    text = f"the layout asked for ranks {found.rank} of {len(found.ranking)} at its best batch, "
    text += f"{1 - own.per_device / best.per_device:.1%} below the best:\n       {_line(own, target)}"
    if found.asked is None:
        return text + "\n       at the batch asked for it does not fit or takes too long"
    return text + f"\n       at the batch asked for:\n       {_line(found.asked, target)}"
