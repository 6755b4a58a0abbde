"""What a step takes: every op of a phase times the layers that repeat it, alone or as two overlapping micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moec.ir import Function, Module, Op, WeightRef
from moec.passes.planning.layout import Layout
from moec.passes.planning.precision import Recipe
from moec.passes.planning.rows import COMMUNICATION, Rows, Step
from moec.passes.planning.sharding import roles
from moec.targets import Target
from moec.targets.cost import Cost, op_time


@dataclass(frozen=True)
class Setting:
    """Everything that the cost of a step depends on besides the step."""

    layout: Layout
    recipe: Recipe
    target: Target
    balance: float


@dataclass(frozen=True)
class OpCost:
    """One line of the table: an op of a function, over all its calls in the step.

    `useful_flops` are those of the mean device, where the busiest one does more.
    """

    op: str
    name: str
    calls: int
    cost: Cost
    useful_flops: float

    @property
    def communication(self) -> bool:
        """Whether the op is an exchange between devices."""
        return self.op in COMMUNICATION


@dataclass(frozen=True)
class StepCost:
    """The ops of a step by segment (a layer function, or what is outside the layers)."""

    segments: dict[str, list[OpCost]] = field(default_factory=dict)

    @property
    def ops(self) -> list[OpCost]:
        """All lines."""
        return [op for ops in self.segments.values() for op in ops]

    @property
    def serial_us(self) -> float:
        """One op after the other."""
        return sum(op.cost.time_us for op in self.ops)

    @property
    def communication_us(self) -> float:
        """The exchanges between devices, added up."""
        return sum(op.cost.time_us for op in self.ops if op.communication)

    def paired_us(self, cores: int) -> float:
        """Two micro-batches of this step, exchanges of one hidden behind the computation of the other.

        In each segment the longer of computation and communication remains; kernels of an exchange that occupy cores
        slow the computation meanwhile.
        """
        total = 0.0
        for ops in self.segments.values():
            compute = sum(op.cost.time_us for op in ops if not op.communication)
            network = sum(op.cost.time_us for op in ops if op.communication)
            stolen = sum(op.cost.time_us * op.cost.sms / cores for op in ops if op.communication)
            total += 2 * max(network, compute + stolen)
        return total

    def __add__(self, other: StepCost) -> StepCost:
        """One step after the other, line by line; both are of the same functions."""
        if not self.segments:
            return other
        joined = {}
        for name, ops in self.segments.items():
            pairs = zip(ops, other.segments[name], strict=True)
            joined[name] = [_joined(a, b) for a, b in pairs]
        return StepCost(joined)

    def __mul__(self, times: float) -> StepCost:
        """The same step `times` times."""
        return StepCost(
            {
                name: [OpCost(o.op, o.name, o.calls, o.cost * times, o.useful_flops * times) for o in ops]
                for name, ops in self.segments.items()
            }
        )


def _joined(a: OpCost, b: OpCost) -> OpCost:
    return OpCost(a.op, a.name, a.calls + b.calls, a.cost + b.cost, a.useful_flops + b.useful_flops)


def step_cost(module: Module, step: Step, setting: Setting) -> StepCost:
    """Walk the phase's entry function and the layer functions that it repeats."""
    segments: dict[str, list[OpCost]] = {}
    for function, calls in functions_of(module, step.phase):
        segments.setdefault(function.name, []).extend(_function(module, function, calls, step, setting))
    return StepCost(segments)


def functions_of(module: Module, phase: str) -> Iterator[tuple[Function, int]]:
    """The entry of a phase, once, and each layer function with its number of layers."""
    entry = module.functions[phase]
    yield entry, 1
    for op in entry.ops:
        if op.name == "repeat":
            first, last = op.attrs["first"], op.attrs["last"]
            assert isinstance(first, int) and isinstance(last, int)
            yield module.functions[str(op.attrs["func"])], last - first + 1


def _function(module: Module, function: Function, calls: int, step: Step, setting: Setting) -> list[OpCost]:
    route = next((op for op in function.ops if op.name == "moe.route"), None)
    rows = Rows(
        step,
        setting.layout,
        setting.recipe,
        setting.target,
        setting.balance,
        top_k=int(route.attrs["top_k"]) if route else 1,  # type: ignore[arg-type]
        top_groups=_top_groups(route),
    )
    out = []
    kinds = roles(function)
    for op in function.ops:
        if op.name == "repeat":
            continue
        for row in rows.of(op, kinds[id(op)]):
            cost = op_time(row, setting.target) * calls
            busy = setting.balance if row["op"] == "moe_experts" and setting.layout.ep > 1 else 1.0
            out.append(OpCost(row["op"], _label(function, op), calls, cost, cost.flops * busy))
    return out


def _top_groups(route: Op | None) -> int | None:
    """Groups, and so nodes, that routing allows a token; None when it does not limit them."""
    if route is None or route.attrs["groups"] == route.attrs["top_groups"]:
        return None
    return int(route.attrs["top_groups"])  # type: ignore[arg-type]


def _label(function: Function, op: Op) -> str:
    weight = next((o for o in op.operands if isinstance(o, WeightRef)), None)
    if weight is not None:
        return weight.name
    return f"{function.name.rsplit('.', 1)[0]}.{op.name}" if "." in function.name else op.name
