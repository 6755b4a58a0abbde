"""split-microbatches: divide a batch so that the exchanges of one part hide behind the computation of another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from moec.figures import figures
from moec.ir import Function, Module
from moec.ir.rewrite import clone_module
from moec.passes.base import Context, Outcome, Pass, PassError
from moec.passes.overlap import Overlap
from moec.passes.scheduling.bounds import interval_bounds_us
from moec.passes.streams.costs import Costs, op_costs, prompt_cuts, wanted_entries, whole_step, work_of
from moec.passes.streams.layer import schedule_layer
from moec.passes.streams.split import split_entry
from moec.passes.streams.tasks import LayerTasks

TRIED = (2, 4)
"""Numbers of micro-batches that are compared with the whole batch."""


@dataclass(frozen=True)
class SplitMicrobatches(Pass):
    """Split the batch of each phase into micro-batches where that shortens a layer by `least` (relative) or more.

    Consumes entries whose repeated layers exchange data between devices; produces entries with the arguments and
    results of every part (`%ids_0`, `%ids_1`, ...) and layer functions with the ops of all parts. Results change by
    nothing: rows are independent. Where there are fewer prompts than parts, every prompt is split, so that its parts
    take as long: a later one reads from the cache what an earlier one left there. `count` is auto, or a number that is
    taken without asking whether it pays. The schedules compared are those that `overlap` finds, for rows as `balance`
    says (see there). `phase` is prefill, decode or both.
    """

    name: ClassVar[str] = "split-microbatches"
    schedules: ClassVar[bool] = True
    count: str = "auto"
    least: float = 0.01
    balance: float = 0.0
    phase: str = "both"

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        if self.count != "auto" and not (self.count.isdigit() and 1 <= int(self.count) <= 16):
            raise PassError(name=self.name, message=f"count must be auto or a number from 1 to 16, got {self.count!r}")
        for entry in wanted_entries(module, self.phase, self.name):
            count = int(self.count) if self.count != "auto" else self._best(module, entry, ctx, out)
            if count > 1:
                cuts = cuts_of(module, entry, ctx, count)
                split_entry(module, entry, count, cuts)
                out.matched += 1
                of = f" of one prompt ({' + '.join(map(str, cuts))} tokens)" if cuts else ""
                out.notes.append(f"@{entry.name}: {count} micro-batches{of}")
        return out

    def _best(self, module: Module, entry: Function, ctx: Context, out: Outcome) -> int:
        if ctx.layout is None or ctx.layout.ranks == 1:
            out.notes.append(f"@{entry.name}: one device, the batch stays whole")
            return 1
        times: dict[int, float] = {}
        beyond: dict[int, float] = {}
        for count in (1, *TRIED):
            limit = min(times.values()) if count > TRIED[0] else math.inf  # both times are shown of one and two
            found = layers_us(module, entry, ctx, count, self.balance, limit)
            if found is None:
                break
            (times if found.searched else beyond)[count] = found.us
            if count > 1 and found.us > times[1] * (1 - self.least):
                break
        if len(times) + len(beyond) < 2:
            reason = "one sequence, too short to be split" if times else "no exchanges"
            out.notes.append(f"@{entry.name}: the batch stays whole: {reason}")
            return 1
        best = min(times, key=lambda c: (times[c], c))
        best = best if times[best] <= times[1] * (1 - self.least) else 1
        shown = ", ".join(f"{count} {figures(time / 1e3)} ms" for count, time in times.items())
        shown += "".join(f", {count} at least {figures(time / 1e3)} ms" for count, time in beyond.items())
        verdict = "stays whole: splitting loses" if best == 1 else f"{best} parts are fastest"
        out.notes.append(f"@{entry.name}: {verdict} (layers with exchanges, by number of micro-batches: {shown})")
        return best


def cuts_of(module: Module, entry: Function, ctx: Context, count: int) -> tuple[int, ...]:
    """Tokens of each part where prompts are to be split, which there are too few of to divide; else ()."""
    phase = str(entry.attrs.get("phase", ""))
    if count == 1 or phase != "prefill" or ctx.layout is None or whole_step(phase, ctx).sequences >= count:
        return ()
    work = work_of(module, phase, ctx, 1)
    assert work is not None
    linear = attention = 0.0
    for op in entry.ops:
        if op.name == "repeat":
            function = module.functions[str(op.attrs["func"])]
            costs = op_costs(function, work)
            if any(t.exchange for t in costs.whole.values()):
                for inner, time in costs.whole.items():
                    if inner.name.startswith("attn."):
                        attention += time.us
                    elif not time.exchange:
                        linear += time.us
    return prompt_cuts(whole_step(phase, ctx), count, linear, attention) if linear else ()


@dataclass(frozen=True)
class LayersTime:
    """Microseconds of the layers that exchange data: of the schedule found or, where none was searched, a bound."""

    us: float
    searched: bool = True


def layers_us(
    module: Module, entry: Function, ctx: Context, count: int, balance: float = 0.0, limit: float = math.inf
) -> LayersTime | None:
    """Predicted time of the layers that exchange data, in so many micro-batches; at least the bound when above `limit`.

    None when there are no such layers or fewer sequences than parts.
    """
    cuts = cuts_of(module, entry, ctx, count)
    work = work_of(module, str(entry.attrs.get("phase", "")), ctx, count, balance, cuts)
    if work is None or work.parts < count:
        return None
    if count > 1:
        module = clone_module(module)
        split_entry(module, module.functions[entry.name], count, cuts)
        entry = module.functions[entry.name]
    overlap = Overlap()
    layers: list[tuple[Function, int, Costs, LayerTasks]] = []
    for op in entry.ops:
        if op.name == "repeat":
            function = module.functions[str(op.attrs["func"])]
            number = int(str(op.attrs["last"])) - int(str(op.attrs["first"])) + 1
            found = overlap.tasks(function, work)
            if found is not None:
                layers.append((function, number, *found))
    if not layers:
        return None
    least = sum(number * max(interval_bounds_us(tasks.graph).values()) for _, number, _, tasks in layers)
    if least >= limit:
        return LayersTime(least, searched=False)
    return LayersTime(
        sum(n * schedule_layer(function, costs, tasks).interval_us for function, n, costs, tasks in layers)
    )
