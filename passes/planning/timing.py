"""What a step takes: every op of a phase times the layers that repeat it, alone or as two overlapping micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from moec.ir import Function, Module, Op, WeightRef
from moec.ir.issue import CALLS, EVENTS
from moec.passes.planning.balance import expected_balance
from moec.passes.planning.layout import Layout
from moec.passes.planning.precision import Recipe
from moec.passes.planning.rank_rows import rank_layout, rank_rows
from moec.passes.planning.rows import COMMUNICATION, Row, Rows, Step
from moec.passes.planning.sharding import roles
from moec.passes.planning.stated import quantised_inputs, stated_recipe
from moec.targets import Target
from moec.targets.cost import Cost, op_time


@dataclass(frozen=True)
class Setting:
    """Everything that the cost of a step depends on besides the step.

    balance: mean over maximum of the rows that devices receive; None for what is expected of the step.
    """

    layout: Layout
    recipe: Recipe
    target: Target
    balance: float | None = None

    def balance_of(self, step: Step, top_k: int) -> float:
        """The balance of a step: as set, or as expected of its requests and rows; 1 without an expert group."""
        if self.layout.ep == 1:
            return 1.0
        if self.balance is not None:
            return self.balance
        rows = step.tokens / self.layout.tp * top_k
        return expected_balance(self.layout, step.sequences * self.layout.ep / self.layout.tp, rows)


@dataclass(frozen=True)
class OpCost:
    """One line of the table: an op of a function, over all its calls in the step.

    `useful_flops` are those of the mean device, where the busiest one does more.
    """

    op: str
    name: str
    calls: float
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

    @property
    def reserved_cores(self) -> int:
        """Cores that the kernels of exchanges keep to themselves while others compute."""
        return max((op.cost.sms for op in self.ops if op.communication and not op.cost.busy_us), default=0)

    @property
    def matrix_us(self) -> float:
        """Time in which the matrix units are busy."""
        return sum(min(o.cost.parts.get("compute", 0.0), o.cost.time_us) for o in self.ops if not o.communication)

    @property
    def segment_us(self) -> dict[str, float]:
        """One op after the other, by segment."""
        return {name: sum(op.cost.time_us for op in ops) for name, ops in self.segments.items()}

    def paired_us(self, bandwidth: float) -> dict[str, float]:
        """Two micro-batches of this step that take turns: one computes while the exchange of the other is under way.

        By segment, which follow each other; see `paired`. bandwidth: of the device memory, bytes/s.
        """
        return {name: paired(stages(ops, bandwidth)) for name, ops in self.segments.items()}

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


@dataclass
class Stage:
    """Computation up to an exchange, then the exchange, in microseconds.

    memory_us: the part of the computation that is bound by memory. busy_us: the part of the exchange that takes all
    cores. traffic_us: what the exchange's own memory traffic takes of the bandwidth.
    """

    compute_us: float = 0.0
    exchange_us: float = 0.0
    memory_us: float = 0.0
    busy_us: float = 0.0
    traffic_us: float = 0.0

    def beside(self, other: Stage) -> float:
        """This exchange and the computation of `other` at the same time."""
        share = other.memory_us / other.compute_us if other.compute_us else 0.0
        return max(self.exchange_us, other.compute_us + self.busy_us + self.traffic_us * share)


def stages(ops: list[OpCost], bandwidth: float) -> list[Stage]:
    """The ops of a layer, over all layers, cut behind each exchange; what follows the last goes to the next layer.

    bandwidth: of the device memory, bytes/s.
    """
    found = [Stage()]
    for op in ops:
        time = op.cost.time_us
        if op.communication:
            found[-1].exchange_us += time
            found[-1].busy_us += op.cost.busy_us
            found[-1].traffic_us += op.cost.bytes / bandwidth * 1e6
            continue
        if found[-1].exchange_us:
            found.append(Stage())
        found[-1].compute_us += time
        found[-1].memory_us += time if op.cost.bound == "memory" else 0.0
    if len(found) > 1 and not found[-1].exchange_us:
        rest = found.pop()
        found[0].compute_us += rest.compute_us
        found[0].memory_us += rest.memory_us
    return found


def paired(of_one: list[Stage]) -> float:
    """Microseconds of two micro-batches, one stage apart: computation of one lies beside an exchange of the other.

    Each exchange meets the computation before it (of the other micro-batch) and the one behind it, and the longer of
    each pair sets the pace, as in the two-micro-batch overlap of the DeepSeek-V3 technical report (arXiv 2412.19437,
    sec. 3.4). Issuing and receiving an exchange takes all cores for a while, which nothing hides, and its traffic slows
    computation that is bound by memory. Never below `max(compute, exchanges)` of both, which finer stages could reach.
    """
    following = of_one[1:] + of_one[:1]
    return sum(stage.beside(stage) + stage.beside(behind) for stage, behind in zip(of_one, following, strict=True))


def _joined(a: OpCost, b: OpCost) -> OpCost:
    return OpCost(a.op, a.name, a.calls + b.calls, a.cost + b.cost, a.useful_flops + b.useful_flops)


@dataclass(frozen=True)
class Line:
    """A row of the cost model with where it is from; `share` of its operations are those of the mean device."""

    segment: str
    label: str
    calls: float
    row: Row
    share: float

    @property
    def communication(self) -> bool:
        """Whether the row is an exchange between devices."""
        return self.row["op"] in COMMUNICATION


def step_cost(module: Module, step: Step, setting: Setting) -> StepCost:
    """The ops of a step one after the other, at the clock that its own load on the matrix units leaves."""
    found = lines(module, step, setting)
    alone = priced(found, setting.target)
    return priced(found, under_load(setting.target, alone.matrix_us / alone.serial_us))


def paired_segments(module: Module, step: Step, setting: Setting) -> dict[str, float]:
    """Microseconds, by segment, of two such steps as micro-batches that hide each other's exchanges (see `paired`).

    Kernels of exchanges that keep cores to themselves take them from all computation, as the libraries' kernels are
    launched on the rest (DeepGEMM's `set_num_sms`, DeepEP's `num_sms`).
    """
    bandwidth = setting.target.device.memory_bandwidth
    found = lines(module, step, setting)
    alone = priced(found, setting.target)
    target = setting.target.without_cores(alone.reserved_cores)
    load = 2 * alone.matrix_us / sum(alone.paired_us(bandwidth).values())
    return priced(found, under_load(target, load)).paired_us(bandwidth)


def under_load(target: Target, load: float) -> Target:
    """The target with its matrix units busy for that share of the time."""
    return replace(target, load=min(load, 1.0))


def lines(module: Module, step: Step, setting: Setting) -> list[Line]:
    """Walk the phase's entry function and the layer functions that it repeats."""
    return [
        line
        for function, calls in functions_of(module, step.phase)
        for line in _function(module, function, calls, step, setting)
    ]


def priced(found: Sequence[Line], target: Target) -> StepCost:
    """The lines with their costs on a target, by segment."""
    segments: dict[str, list[OpCost]] = {}
    for line in found:
        cost = op_time(line.row, target) * line.calls
        op = OpCost(line.row["op"], line.label, line.calls, cost, cost.flops * line.share)
        segments.setdefault(line.segment, []).append(op)
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


def rows_of(
    function: Function,
    step: Step,
    setting: Setting,
    chosen: Callable[[Op], bool] = lambda op: True,
    rank: bool = False,
    stated: bool = False,
) -> Iterator[tuple[Op, Row]]:
    """The rows of the cost model of the chosen ops, in order; an op may have several, one after the other.

    rank: the function is sharded, its types are those of one rank. stated: casts have been made, an op runs in the
    precision of its own types; else in that of the setting's recipe.
    """
    route = next((op for op in function.ops if op.name == "moe.route"), None)
    top_k = int(route.attrs["top_k"]) if route else 1  # type: ignore[arg-type]
    balance = setting.balance_of(step, top_k)
    layout = rank_layout(setting.layout) if rank else setting.layout
    rows = Rows(step, layout, setting.recipe, setting.target, balance, top_k, _top_groups(route))
    kinds = roles(function)
    rule = rank_rows if rank else Rows.of
    for op in function.ops:
        if op.name not in CALLS and op.name not in EVENTS and chosen(op):
            if stated:
                rows.recipe = stated_recipe(op)
                rows.quantised |= quantised_inputs(op)
            for row in rule(rows, op, kinds[id(op)]):
                yield op, row


def _function(module: Module, function: Function, calls: int, step: Step, setting: Setting) -> Iterator[Line]:
    balance = setting.balance_of(step, routed_to(module))
    for op, row in rows_of(function, step, setting):
        share = balance if row["op"] == "moe_experts" else 1.0
        yield Line(function.name, _label(function, op), calls, row, share)


def routed_to(module: Module) -> int:
    """Experts that a token is sent to; 1 for a dense model."""
    return next((int(op.attrs["top_k"]) for _, op in module.ops() if op.name == "moe.route"), 1)  # type: ignore[arg-type]


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
