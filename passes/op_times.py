"""What each op of a module takes on its target, by the planner's rows with the types that the module itself states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moec.errors import MoecError
from moec.ir import Module, Op, TensorType, Value, WeightRef
from moec.passes.base import Context
from moec.passes.planning.layout import Layout, expert_count
from moec.passes.planning.precision import Recipe
from moec.passes.planning.rows import Rows, Step
from moec.passes.planning.sharding import roles
from moec.passes.planning.timing import Setting, functions_of
from moec.targets.cost import Cost, op_time

LOW = ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "i8")

EXCHANGES = {"comm.dispatch": "moe.dispatch", "comm.combine": "moe.combine"}
"""Ops between ranks that cost what the planner's exchange over the layout's ranks costs."""


@dataclass(frozen=True)
class OpTime:
    """One op of a phase: its function, how many layers run it in a step, and the cost of one run on one device.

    `cost` is None where the model has no answer; `why` then says so.
    """

    phase: str
    function: str
    op: Op
    layers: int
    cost: Cost | None
    why: str = ""

    @property
    def step_us(self) -> float:
        """Microseconds of all its runs in a step."""
        return self.cost.time_us * self.layers if self.cost else 0.0

    @property
    def low(self) -> bool:
        """Whether it computes on, or makes, numbers of 8 bits or fewer."""
        types = [o.type for o in self.op.operands] + [r.type for r in self.op.results]
        return any(isinstance(t, TensorType) and t.dtype in LOW for t in types)


def op_times(module: Module, ctx: Context) -> list[OpTime]:
    """Every op that a step of each phase runs, in order: decode of `limits.batch` sequences, prefill of a chunk."""
    return [t for phase in ("prefill", "decode") if phase in module.functions for t in _phase(module, ctx, phase)]


def _phase(module: Module, ctx: Context, phase: str) -> Iterator[OpTime]:
    limits, experts = ctx.limits, expert_count(module)
    layout = ctx.layout or Layout(1, 1, 1, experts, experts)
    decode = phase == "decode"
    step = _Step(
        phase, limits.batch if decode else 1, 1 if decode else min(limits.chunk, limits.context), limits.context
    )
    for function, layers in functions_of(module, phase):
        route = next((op for op in function.ops if op.name == "moe.route"), None)
        top_k = int(str(route.attrs["top_k"])) if route else 1
        groups = int(str(route.attrs["top_groups"])) if route and route.attrs["groups"] != 1 else None
        balance = Setting(layout, _recipe(None), ctx.target).balance_of(step, top_k)
        rows = Rows(step, layout, _recipe(None), ctx.target, balance, top_k, groups)
        # Frozen like its base: the tokens that arrive follow from the rows.
        object.__setattr__(step, "delivered", rows.expert_rows)
        kinds = roles(function)
        for op in function.ops:
            if op.name == "repeat":
                continue
            rows.recipe = _recipe(op)
            # What a quant.cast made is paid for there.
            rows.quantised |= {o for o in op.operands if isinstance(o, Value) and _low(o.type)}
            try:
                found = rows.of(_as_planned(op), kinds[id(op)])
                cost = sum((op_time(row, ctx.target) for row in found), start=Cost(0.0))
                yield OpTime(phase, function.name, op, layers, cost)
            except (MoecError, ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
                yield OpTime(phase, function.name, op, layers, None, str(error) or type(error).__name__)


class _Symbols(dict[str, int]):
    """Values of symbols; any other, the tokens that an exchange delivers, counts as those of the busiest device."""

    delivered = 0

    def __missing__(self, name: str) -> int:
        return self.delivered


class _Step(Step):
    """A step whose symbols include what exchanges deliver."""

    delivered = 0

    @property
    def symbols(self) -> dict[str, int]:
        """Values of the IR's symbols."""
        found = _Symbols(super().symbols)
        found.delivered = self.delivered
        return found


def _as_planned(op: Op) -> Op:
    """An exchange between ranks as the planner knows it: from activations on."""
    if op.name not in EXCHANGES:
        return op
    operands = [o for o in op.operands if isinstance(o.type, TensorType)]
    return replace(op, name=EXCHANGES[op.name], operands=operands)


def _low(t: object) -> bool:
    return isinstance(t, TensorType) and t.dtype in LOW


def _recipe(op: Op | None) -> Recipe:
    """The planner's recipe that stands for an op's own types; an FP32 matrix is taken as BF16."""
    types = [(isinstance(o, WeightRef), o.type) for o in op.operands] if op else []
    matrix = "fp8_block" if any(weight and _low(t) for weight, t in types) else "bf16"
    wire = "fp8" if any(not weight and _low(t) for weight, t in types) else "bf16"
    return Recipe("as stated", matrix, matrix, wire)
