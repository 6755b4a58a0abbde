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
        """Two micro-batches of this step that take turns: one computes while the exchange of the other is under way.

        See `paired`. Segments follow each other.
        """
        return sum(paired(stages(ops), cores) for ops in self.segments.values())

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


@dataclass(frozen=True)
class Stage:
    """Computation up to an exchange, then the exchange: microseconds, and core-microseconds that the exchange takes."""

    compute_us: float
    exchange_us: float = 0.0
    core_us: float = 0.0


def stages(ops: list[OpCost]) -> list[Stage]:
    """The ops of a layer, over all layers, cut behind each exchange; what follows the last goes to the next layer."""
    found: list[Stage] = []
    compute = exchange = core = 0.0
    for op in ops:
        if op.communication:
            exchange += op.cost.time_us
            core += op.cost.time_us * op.cost.sms
            continue
        if exchange:
            found.append(Stage(compute, exchange, core))
            compute = exchange = core = 0.0
        compute += op.cost.time_us
    if exchange:
        found.append(Stage(compute, exchange, core))
    elif found:
        first = found[0]
        found[0] = Stage(first.compute_us + compute, first.exchange_us, first.core_us)
    else:
        found.append(Stage(compute))
    return found


def paired(of_one: list[Stage], cores: int) -> float:
    """Microseconds of two micro-batches, one stage apart: computation of one lies beside an exchange of the other.

    Each exchange meets the computation before it (of the other micro-batch) and the one behind it, and the longer of
    each pair sets the pace, as in the two-micro-batch overlap of the DeepSeek-V3 technical report (arXiv 2412.19437,
    sec. 3.4). An exchange whose kernel occupies cores slows the computation beside it by their share. Never below
    `max(compute, exchanges)` of both, which finer stages could approach.
    """
    total = 0.0
    for index, stage in enumerate(of_one):
        behind = of_one[(index + 1) % len(of_one)]
        for compute in (stage.compute_us, behind.compute_us):
            total += max(stage.exchange_us, compute + stage.core_us / cores)
    return total


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
