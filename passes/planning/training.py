"""A training step: forward and backward of every micro-batch through a pipeline, then the optimiser.

Layers are spread over stages by their cost. A chunk is what one stage does with one micro-batch; its durations come
from the cost model, the schedule from `moec.simulate`: alone a chunk waits for its exchanges, a forward and a backward
in one cell (DualPipe, DeepSeek-V3 technical report, arXiv 2412.19437, sec. 3.2.1) hide them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moec.ir import Module
from moec.ir.stats import active_parameters, weight_elements
from moec.passes.planning.backward import Pass, training_pass
from moec.passes.planning.balance import sampled_balance
from moec.passes.planning.cell import CellSchedule, schedule_cell
from moec.passes.planning.errors import WrongPlan
from moec.passes.planning.forms import PLAIN, variants
from moec.passes.planning.layout import Layout, LayoutRequest, resolve
from moec.passes.planning.memory import saved_bytes, stage_bytes
from moec.passes.planning.pipelining import layer_times, send_us, split_layers
from moec.passes.planning.plan import hidden_size
from moec.passes.planning.precision import Recipe, candidates
from moec.passes.planning.published import attention_sizes
from moec.passes.planning.rows import Step
from moec.passes.planning.timing import OpCost, Setting, Stage, StepCost, lines, priced, routed_to, under_load
from moec.simulate.pipeline import Pipeline, pipeline
from moec.simulate.step import ChunkTimes, StepReport, bubble_formula, peak_activations, pipeline_timeline, report_step
from moec.targets import Target
from moec.targets.cost import op_time
from moec.targets.cost.closed_forms import mfu, training_flops_per_token

_GRADIENT = 4
_MASTER_AND_MOMENTS = 4 + 2 + 2
"""Bytes a parameter: FP32 gradients; FP32 master weights with BF16 moments (arXiv 2412.19437, sec. 3.3.3)."""

_DAY = 86_400
_ELEMENTS = Recipe("elements", "bf16", "bf16", "bf16")


@dataclass(frozen=True)
class TrainOptions:
    """The step: `global_batch` sequences of `sequence` tokens, in micro-batches of `micro_batch` sequences.

    balance: mean over maximum of the rows that devices receive, None for what is expected of a micro-batch.
    """

    sequence: int = 4096
    global_batch: int = 15360
    micro_batch: int = 1
    schedule: str = "dualpipe"
    layout: LayoutRequest = field(default_factory=lambda: LayoutRequest(pp=16, ep=64))
    recipe: str = "auto"
    balance: float | None = None


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a device: weights, FP32 gradients, optimiser state, activations of the micro-batches under way."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    micro_batches: int

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimiser + self.activations


@dataclass(frozen=True)
class TrainingPlan:
    """Times in seconds. chunk: one micro-batch in the slowest stage. parts: of an average rank (F, B, W, F&B).

    bubble: idle time of an average rank, sends between stages included; formula_bubble: Table 2 of the report. cell: a
    forward and a backward beside the exchanges of both. layer: the schedule of one layer of it, None without exchanges.
    """

    target: Target
    layout: Layout
    recipe: Recipe
    options: TrainOptions
    chunk: ChunkTimes
    split: list[int]
    micro_batches: int
    parts: dict[str, float]
    bubble_s: float
    formula_bubble_s: float
    send_s: float
    optimiser_s: float
    step_s: float
    flops_per_token: dict[str, float]
    memory: list[StageMemory]
    cell: Stage
    layer: CellSchedule | None
    balance: float

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.options.global_batch * self.options.sequence

    @property
    def fits(self) -> bool:
        """Whether every device has room."""
        return max(m.total for m in self.memory) <= self.target.device.memory_bytes

    @property
    def tokens_per_day(self) -> float:
        """Tokens of a day without interruptions."""
        return self.tokens / self.step_s * _DAY

    def tflops(self, kind: str) -> float:
        """Useful TFLOP/s of a device; kind: causal or non-causal attention."""
        return self.tokens / self.step_s * self.flops_per_token[kind] / self.layout.ranks / 1e12

    def mfu(self, kind: str) -> float:
        """Useful operations over the BF16 peak, as published figures count it."""
        peak = self.target.device.matrix_rate("bf16")
        return mfu(self.tokens / self.step_s, self.flops_per_token[kind], self.layout.ranks, peak)


def make_training_plan(module: Module, target: Target, options: TrainOptions) -> TrainingPlan:
    """Plan a training step of an imported module (attention in the plain form).

    Raises WrongPlan, BadPipeline and what `resolve` raises.
    """
    recipe = candidates(options.recipe, target)[0]
    layout, sized = resolve(module, target, recipe, replace(options.layout, redundant=0))
    count = _micro_batches(options, layout)
    # DualPipeV folds a pipeline: two stages on each of its devices.
    stages = 2 * layout.pp if options.schedule == "dualpipev" else layout.pp
    pipe = pipeline(options.schedule, stages, count)
    setting = Setting(layout, recipe, sized, options.balance or _balance(module, layout, options))
    built = variants(module, setting)[PLAIN]
    step = Step("prefill", options.micro_batch, options.sequence, options.sequence)
    found = training_pass(built, lines(built, step, setting), step.tokens)
    cost = _Chunks(built, found, setting)
    split = split_layers(cost.layers, stages)
    chunk = cost.times(split)
    size = step.tokens / layout.tp * hidden_size(module) * 2
    send = send_us(sized, size, layout.ranks // layout.pp) * 1e-6 if layout.pp > 1 else 0.0
    run = report_step(pipe, pipeline_timeline(pipe, chunk, send))
    optimiser = _optimiser(module, layout, sized, split, pipe)
    return TrainingPlan(
        sized, layout, recipe, options, chunk, split, count,
        parts=_average(run), bubble_s=sum(run.idle) / len(run.idle),
        formula_bubble_s=bubble_formula(options.schedule, stages, chunk), send_s=send, optimiser_s=optimiser,
        step_s=run.length + optimiser, flops_per_token=_flops(module, options.sequence),
        memory=_memory(module, built, layout, recipe, split, pipe, step, setting), cell=cost.cell(split),
        layer=cost.layer, balance=setting.balance or 1.0,
    )  # fmt: skip


def _micro_batches(options: TrainOptions, layout: Layout) -> int:
    for name in ("sequence", "global_batch", "micro_batch"):
        if getattr(options, name) < 1:
            raise WrongPlan(message=f"{name.replace('_', ' ')} must be at least 1, got {getattr(options, name)}")
    together = layout.dp * options.micro_batch
    if options.global_batch % together:
        near = max(1, round(options.global_batch / together)) * together
        raise WrongPlan(
            message=f"global batch {options.global_batch} does not divide over {layout.dp} replicas in micro-batches "
            f"of {options.micro_batch}; try {near}"
        )
    return options.global_batch // together


def _balance(module: Module, layout: Layout, options: TrainOptions) -> float:
    """Mean over maximum of a micro-batch: training evens out the experts' loads over time, not those of one batch."""
    sequences = options.micro_batch * layout.ep / layout.tp
    rows = options.micro_batch * options.sequence / layout.tp * routed_to(module)
    return sampled_balance(layout.ep, sequences, rows)


class _Chunks:
    """Costs of a micro-batch: by layer, and of the slowest stage of a split."""

    def __init__(self, module: Module, found: Pass, setting: Setting) -> None:
        self._module, self._memory = module, setting.target.device.memory_bandwidth
        forward = priced(found.forward, setting.target)
        hot = under_load(setting.target, forward.matrix_us / forward.serial_us)
        busy = under_load(setting.target.without_cores(forward.reserved_cores), 1.0)
        parts = (found.forward, found.inputs, found.weights)
        self._parts = [priced(part, hot) for part in parts]
        self._beside = [priced([line for line in part if not line.communication], busy) for part in parts]
        self._exchanges = [priced([line for line in part if line.communication], hot) for part in parts]
        each = [self._by_layer(cost.segment_us) for cost in self._parts]
        self.layers = [sum(of_layer) for of_layer in zip(*each, strict=True)]
        self.layer = _scheduled(found, busy, hot)

    def times(self, split: Sequence[int]) -> ChunkTimes:
        """Seconds of the slowest stage."""
        forward, inputs, weights = (self._slowest(cost.segment_us, split) for cost in self._parts)
        cell = self.cell(split)
        stretched = self.layer.stretched if self.layer else 1.0
        return ChunkTimes(forward, inputs + weights, weights, cell.beside(cell) * stretched * 1e-6)

    def cell(self, split: Sequence[int]) -> Stage:
        """A forward and a backward of the slowest stage, with the exchanges of both."""
        found = Stage()
        for cost in self._beside:
            found.compute_us += self._slowest(cost.segment_us, split) * 1e6
            memory = _sums(cost, lambda op: op.cost.time_us if op.cost.bound == "memory" else 0.0)
            found.memory_us += self._slowest(memory, split) * 1e6
        for cost in self._exchanges:
            found.exchange_us += self._slowest(cost.segment_us, split) * 1e6
            traffic = _sums(cost, lambda op: op.cost.bytes / self._memory * 1e6)
            found.traffic_us += self._slowest(traffic, split) * 1e6
        return found

    def _slowest(self, segments: Mapping[str, float], split: Sequence[int]) -> float:
        totals = [sum(part) for part in _cut(self.layers, split)]
        return sum(_cut(self._by_layer(segments), split)[totals.index(max(totals))]) * 1e-6

    def _by_layer(self, segments: Mapping[str, float]) -> list[float]:
        return layer_times(self._module, "prefill", dict.fromkeys(self._parts[0].segments, 0.0) | dict(segments))


def _scheduled(found: Pass, busy: Target, hot: Target) -> CellSchedule | None:
    """The overlapped layer of the function that most layers with exchanges call."""
    calls = {line.segment: line.calls for line in found.forward if line.communication}
    if not calls:
        return None
    most = max(calls, key=lambda segment: calls[segment])
    kinds = {"F": found.forward, "B": found.inputs, "W": found.weights}
    return schedule_cell({k: [line for line in of if line.segment == most] for k, of in kinds.items()}, busy, hot)


def _sums(cost: StepCost, of: Callable[[OpCost], float]) -> dict[str, float]:
    return {name: sum(of(op) for op in ops) for name, ops in cost.segments.items()}


def _cut(layers: Sequence[float], split: Sequence[int]) -> list[Sequence[float]]:
    found, start = [], 0
    for count in split:
        found.append(layers[start : start + count])
        start += count
    return found


def _average(run: StepReport) -> dict[str, float]:
    return {kind: sum(part[kind] for part in run.parts) / len(run.parts) for kind in ("F", "B", "W", "F&B")}


def _flops(module: Module, sequence: int) -> dict[str, float]:
    embedding = sum(weight_elements(w) for w in module.weights.values() if w.name == "embed")
    sizes, active = attention_sizes(module), active_parameters(module)
    return {
        kind: training_flops_per_token(active, embedding, *sizes, sequence, kind == "causal")
        for kind in ("causal", "non-causal")
    }


def _held(pipe: Pipeline) -> list[list[int]]:
    """The stages whose parameters each rank holds."""
    return [sorted({part.stage for cell in cells for part in cell.parts}) for cells in pipe.programs]


@dataclass(frozen=True)
class _Stage:
    """Parameters of a device in one stage: replicated over the data-parallel devices, and of its experts."""

    replicated: float
    experts: float


def _stages(module: Module, layout: Layout, split: Sequence[int]) -> list[_Stage]:
    every = stage_bytes(module, layout, _ELEMENTS, split, tables=False)
    shared = stage_bytes(module, replace(layout, slots=0), _ELEMENTS, split, tables=False)
    return [_Stage(some / 2, (total - some) / 2) for total, some in zip(every, shared, strict=True)]


def _copies(layout: Layout, pipe: Pipeline) -> tuple[int, int]:
    """Devices that hold the same replicated parameters, and the same experts: both ends of a DualPipe count."""
    twice = sum(len(held) for held in _held(pipe)) // pipe.stages
    return layout.dp * twice, max(1, layout.dp * layout.tp // layout.ep) * twice


def _optimiser(module: Module, layout: Layout, target: Target, split: Sequence[int], pipe: Pipeline) -> float:
    """Seconds to sum the gradients, update the own share of the parameters (ZeRO-1) and gather them, of the slowest
    rank; nothing of it is hidden."""
    found = _stages(module, layout, split)
    copies = _copies(layout, pipe)
    slowest = 0.0
    for held in _held(pipe):
        time = 0.0
        sizes = (sum(found[s].replicated for s in held), sum(found[s].experts for s in held))
        for size, count in zip(sizes, copies, strict=True):
            # Replicas of experts lie on different nodes: one device a node takes part.
            spread = target if size == sizes[0] else replace(target, node=replace(target.node, devices=1, nics=1))
            rows = ({"op": "reduce_scatter", "bytes": round(_GRADIENT * size), "ranks": count},
                    {"op": "all_gather", "bytes": round(2 * size), "ranks": count})  # fmt: skip
            time += sum(op_time(row, spread).time_us for row in rows)
            # State is read and written, the gradient read, the new weight written.
            moved = size / count * (2 * _MASTER_AND_MOMENTS + _GRADIENT + 2)
            time += op_time({"op": "stream", "bytes": round(moved)}, target).time_us
        slowest = max(slowest, time)
    return slowest * 1e-6


def _memory(
    module: Module, built: Module, layout: Layout, recipe: Recipe, split: Sequence[int], pipe: Pipeline, step: Step,
    setting: Setting,
) -> list[StageMemory]:  # fmt: skip
    stored = stage_bytes(module, layout, recipe, split)
    found, copies = _stages(module, layout, split), _copies(layout, pipe)
    by_layer = saved_bytes(built, step, setting)
    saved = [sum(part) for part in _cut(by_layer, split)]
    memory = []
    for held, cells in zip(_held(pipe), pipe.programs, strict=True):
        parameters = sum(found[s].replicated + found[s].experts for s in held)
        state = sum(found[s].replicated / copies[0] + found[s].experts / copies[1] for s in held)
        under_way = peak_activations(cells)
        memory.append(
            StageMemory(
                sum(stored[s] for s in held),
                _GRADIENT * parameters,
                _MASTER_AND_MOMENTS * state,
                under_way * max(saved[s] for s in held),
                under_way,
            )
        )
    return memory
