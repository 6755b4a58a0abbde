"""What each op of a module takes on its target, by the planner's rows with the types that the module itself states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moec.errors import MoecError
from moec.ir import Function, Module, Op
from moec.ir.issue import CALLS, EVENTS, entries
from moec.ir.mesh import mesh_of
from moec.passes.base import Context
from moec.passes.laid_out import layout_of
from moec.passes.planning.precision import RECIPES
from moec.passes.planning.rank_rows import rank_layout, rank_rows
from moec.passes.planning.rows import Rows
from moec.passes.planning.sharding import roles
from moec.passes.planning.stated import low, quantised_inputs, stated_recipe
from moec.passes.planning.timing import Setting
from moec.passes.streams.costs import Work, split_step, whole_step
from moec.targets.cost import Cost, op_time


@dataclass(frozen=True)
class OpTime:
    """One op of a phase: its function, how often a step runs it, and the cost of one run on one device.

    `cost` is None where the model has no answer; `why` then says so.
    """

    phase: str
    function: str
    op: Op
    runs: int
    cost: Cost | None
    why: str = ""

    @property
    def step_us(self) -> float:
        """Microseconds of all its runs in a step."""
        return self.cost.time_us * self.runs if self.cost else 0.0

    def __str__(self) -> str:
        """`12.3 us x 58, memory`: one run, the runs of a step, what bounds it."""
        if self.cost is None:
            return f"unknown time ({self.why})"
        bound = self.cost.bound if self.cost.time_us else "view"
        return f"{self.cost.time_us:.1f} us{f' x {self.runs}' if self.runs > 1 else ''}, {bound}"

    @property
    def low(self) -> bool:
        """Whether it computes on, or makes, numbers of 8 bits or fewer."""
        return any(low(t) for t in [o.type for o in self.op.operands] + [r.type for r in self.op.results])


def op_times(module: Module, ctx: Context) -> list[OpTime]:
    """Every op that a step of each entry runs, in order: decode of `limits.batch` sequences, prefill of a chunk.

    Of a model in pipeline stages the ops of all stages, one stage after the other.
    """
    return [t for entry in entries(module) if entry.attrs.get("phase") for t in _entry(module, ctx, entry)]


def step_us(module: Module, times: Sequence[OpTime], phase: str) -> tuple[float, float]:
    """Microseconds of a step of a phase: as scheduled, and with its ops one after the other.

    Layers with a schedule follow each other by its interval; where a pipeline of layers fills and drains, and in all
    other functions, ops are counted one after the other.
    """
    serial: dict[str, float] = {}
    hidden = 0.0
    for t in times:
        if t.phase == phase:
            serial[t.function] = serial.get(t.function, 0.0) + t.step_us
    runs = {t.function: t.runs for t in times}
    for name, us in serial.items():
        interval = module.functions[name].attrs.get("interval_us")
        if isinstance(interval, float):
            hidden += us - interval * runs[name]
    total = sum(serial.values())
    return total - hidden, total


def _entry(module: Module, ctx: Context, entry: Function) -> Iterator[OpTime]:
    phase, label = str(entry.attrs["phase"]), entry.name.partition(".")[0]
    parts = split_step(whole_step(phase, ctx), int(str(entry.attrs.get("micro_batches", 1))))
    setting = Setting(ctx.layout or layout_of(module), RECIPES["bf16"], ctx.target)  # not asked: ops state theirs
    work = Work(setting, parts, rank=mesh_of(module).ranks > 1)
    runs = Counter({entry.name: 1})
    for op in entry.ops:
        if op.name in CALLS:
            runs[str(op.attrs["func"])] += int(str(op.attrs.get("last", 0))) - int(str(op.attrs.get("first", 0))) + 1
    # Values that a pipeline of layers carries have symbols of the function that made them.
    more: dict[int, dict[str, int]] = {step.index: {} for step in parts}
    for sized in (work.sized(module.functions[name]) for name in runs):
        for step in sized.steps:
            more[step.index] |= dict(step.more)
    work = replace(work, steps=tuple(replace(step, more=tuple(more[step.index].items())) for step in parts))
    for name, count in runs.items():
        function = module.functions[name]
        costs = _costs(function, work)
        yield from (OpTime(label, name, op, count, *costs[op]) for op in function.ops if op in costs)


def _costs(function: Function, work: Work) -> dict[Op, tuple[Cost | None, str]]:
    """The cost of each op but calls and events, or why there is none."""
    found: dict[Op, tuple[Cost | None, str]] = {}
    route = next((op for op in function.ops if op.name == "moe.route"), None)
    top_k = int(str(route.attrs["top_k"])) if route else 1
    groups = int(str(route.attrs["top_groups"])) if route and route.attrs["groups"] != 1 else None
    kinds, setting = roles(function), work.setting
    layout = rank_layout(setting.layout) if work.rank else setting.layout
    for step in work.steps:
        rows = Rows(step, layout, setting.recipe, setting.target, setting.balance_of(step, top_k), top_k, groups)
        for op in function.ops:
            if op.name in (*CALLS, *EVENTS) or int(str(op.attrs.get("micro_batch", 0))) != step.index:
                continue
            rows.recipe = stated_recipe(op)
            rows.quantised |= quantised_inputs(op)
            try:
                made = rank_rows(rows, op, kinds[id(op)]) if work.rank else rows.of(op, kinds[id(op)])
                found[op] = sum((op_time(row, setting.target) for row in made), start=Cost(0.0)), ""
            except (MoecError, ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
                found[op] = None, str(error) or type(error).__name__
    return found
