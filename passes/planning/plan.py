"""The planner: a module, a target and a layout in; times, memory, rates and what bounds them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from moec.errors import MoecError
from moec.ir import Module, TensorType
from moec.passes.planning import memory as sizes
from moec.passes.planning.balance import placement_limit
from moec.passes.planning.errors import WrongPlan
from moec.passes.planning.forms import Choice, Variants, choose, variants
from moec.passes.planning.layout import Layout, LayoutRequest, expert_count, levelling_slots, resolve
from moec.passes.planning.memory import Memory
from moec.passes.planning.pipelining import layer_times, pipelined_us, send_us, split_layers
from moec.passes.planning.precision import Recipe, candidates, substitution
from moec.passes.planning.rows import Step
from moec.passes.planning.timing import OpCost, Setting, StepCost, paired_segments, routed_to, step_cost
from moec.passes.planning.whatif import TRIED, doubled
from moec.targets import NoLink, Target

PHASES = ("prefill", "decode")
OVERLAP = ("auto", "on", "off")
_CHUNKS_WALKED = 16
_MOST = 1 << 20


@dataclass(frozen=True)
class Options:
    """The workload and the choices left to the user.

    batch: requests of an attention replica in a decode step. context: tokens that each attends to. prompt: tokens of a
    prompt that arrives with nothing cached. chunk: new tokens that a replica computes in one prefill step. balance:
    mean over maximum of the rows that devices receive, None for what `moec.passes.planning.balance` expects.
    """

    batch: int = 128
    context: int = 4096
    prompt: int = 4096
    chunk: int = 16384
    layout: LayoutRequest = field(default_factory=LayoutRequest)
    recipe: str = "auto"
    balance: float | None = None
    overlap: str = "auto"


@dataclass(frozen=True)
class PhasePlan:
    """One phase. Times in microseconds, rates in tokens/s.

    serial_us: ops one after the other. paired_us: as two micro-batches that hide each other's exchanges; None where
    there is nothing to hide or to halve. step_us: the one taken. tokens: of a replica in the step. balance: mean over
    maximum of the rows that devices receive, in the step as a whole.
    """

    phase: str
    choice: Choice
    tokens: int
    serial_us: float
    paired_us: float | None
    step_us: float
    memory: Memory
    layout: Layout
    target: Target
    peak: float
    balance: float

    @property
    def overlapped(self) -> bool:
        """Whether two micro-batches overlap."""
        return self.paired_us is not None and self.step_us == self.paired_us

    @property
    def ops(self) -> list[OpCost]:
        """The ops of the whole batch, in order."""
        return self.choice.cost.ops

    @property
    def per_device(self) -> float:
        """Tokens/s of one device."""
        return self.tokens / self.layout.tp / self.step_us * 1e6

    @property
    def per_node(self) -> float:
        """Tokens/s of a node."""
        return self.per_device * min(self.layout.ranks, self.target.node.devices)

    @property
    def total(self) -> float:
        """Tokens/s of all ranks."""
        return self.per_device * self.layout.ranks

    @property
    def exposed_us(self) -> float:
        """Communication that no computation hides."""
        if not self.overlapped:
            return self.choice.cost.communication_us
        alone = self.serial_us - self.choice.cost.communication_us
        return max(0.0, self.step_us - alone)

    @property
    def mfu(self) -> float:
        """Useful FLOP/s over the peak of the type that products run in."""
        return sum(op.useful_flops for op in self.ops) / (self.step_us * 1e-6 * self.peak)

    @property
    def by_bound(self) -> dict[str, float]:
        """Microseconds of the ops by what bounds each; hidden communication is left out."""
        found: dict[str, float] = {}
        for op in self.ops:
            if not op.communication:
                found[op.cost.bound] = found.get(op.cost.bound, 0.0) + op.cost.time_us
        found["network"] = self.exposed_us
        return found

    @property
    def bound(self) -> str:
        """What most of the step's time waits for."""
        return max(self.by_bound, key=lambda b: self.by_bound[b])


@dataclass(frozen=True)
class Plan:
    """Both phases of a model on a target; `warnings` for what does not fit, `notes` for what was chosen.

    gains: relative gain in tokens/s of each phase when one number of the target doubles.
    """

    target: Target
    layout: Layout
    recipe: Recipe
    options: Options
    phases: dict[str, PhasePlan]
    notes: list[str]
    warnings: list[str]
    gains: dict[str, dict[str, float]]

    @property
    def first_token_ms(self) -> float:
        """A prompt that waits for nothing: its prefill step, all chunks of it."""
        return self.phases["prefill"].step_us / 1e3

    @property
    def time_per_token_ms(self) -> float:
        """Between two tokens of a request: the decode step."""
        return self.phases["decode"].step_us / 1e3


def make_plan(module: Module, target: Target, options: Options) -> Plan:
    """Plan an imported module (attention in the plain form).

    Raises WrongPlan, WrongLayout, WrongRedundancy, CutBlock, WrongRanks, NoLink or Uncalibrated. A model that does not
    fit is planned all the same, with a warning.
    """
    limit = model_limit(module)
    check(options, limit)
    plans = [_with_recipe(module, target, recipe, options, limit) for recipe in candidates(options.recipe, target)]
    return min(plans, key=lambda p: (p.phases["decode"].memory.missing > 0, p.time_per_token_ms))


def _with_recipe(module: Module, target: Target, recipe: Recipe, options: Options, limit: int) -> Plan:
    layout, sized = resolve(module, target, recipe, options.layout)
    setting = Setting(layout, recipe, sized, options.balance)
    built = variants(module, setting)
    phases = {phase: _phase(module, built, phase, options, limit, setting) for phase in PHASES}
    notes = [note for note in (substitution(recipe, sized), _slots_note(layout, options)) if note]
    warnings = _fit_warnings(module, target, recipe, options, phases)
    gains = {key: gain for key in TRIED if (gain := _gain(built, key, options, setting, phases))}
    return Plan(sized, layout, recipe, options, phases, notes, warnings, gains)


def check(options: Options, limit: int) -> None:
    """Raise WrongPlan for a workload outside the model's limits."""
    for name in ("batch", "context", "prompt", "chunk"):
        if not 1 <= getattr(options, name) <= _MOST:
            raise WrongPlan(message=f"{name} must lie in 1..{_MOST}, got {getattr(options, name)}")
    for name in ("context", "prompt"):
        if getattr(options, name) > limit:
            raise WrongPlan(message=f"{name} {getattr(options, name)} exceeds the model's {limit} positions")
    if options.balance is not None and not 0 < options.balance <= 1:
        raise WrongPlan(message=f"balance is mean over maximum, above 0 and at most 1, got {options.balance:g}")
    if options.overlap not in OVERLAP:
        raise WrongPlan(message=f"overlap must be one of {', '.join(OVERLAP)}, got {options.overlap!r}")


def model_limit(module: Module) -> int:
    """Positions that the model can attend to."""
    programs = (op for w in module.weights.values() for op in w.program.ops)
    return next(int(op.attrs["positions"]) for op in programs if op.name == "weight.rope_table")  # type: ignore[arg-type]


def step_of(phase: str, options: Options) -> Step:
    """The step of a phase; for prompts longer than a chunk, the last chunk."""
    if phase == "decode":
        return Step(phase, options.batch, 1, options.context)
    if options.prompt <= options.chunk:
        return Step(phase, options.chunk // options.prompt, options.prompt, options.prompt)
    return Step(phase, 1, options.chunk, options.prompt)


def _chunks(step: Step, prompt: int) -> Iterator[tuple[Step, float]]:
    """The steps that compute a prompt, with weights: many chunks are sampled evenly, as costs grow evenly."""
    count = -(-prompt // step.new)
    if count <= _CHUNKS_WALKED:
        for index in range(count):
            end = min((index + 1) * step.new, prompt)
            yield replace(step, new=end - index * step.new, context=end), 1.0
        return
    for index in range(_CHUNKS_WALKED):
        chunk = (2 * index + 1) * count // (2 * _CHUNKS_WALKED)
        yield replace(step, context=min((chunk + 1) * step.new, prompt)), count / _CHUNKS_WALKED


def _phase(module: Module, built: Variants, phase: str, options: Options, limit: int, setting: Setting) -> PhasePlan:
    step = step_of(phase, options)
    choice = choose(built, step, limit, setting)
    form = built[choice.form]
    if phase == "prefill":
        choice = replace(choice, cost=_whole(form, step, options, setting))
    timed = time_step(form, step, choice.cost, options.overlap, setting)
    tokens = step.tokens if phase == "decode" or step.sequences > 1 else options.prompt
    peak = setting.target.device.matrix_rate("fp8" if setting.recipe.blocks else "bf16")
    memory = step_memory(module, form, step, timed.split, setting)
    balance = setting.balance_of(step, routed_to(module))
    target = setting.target
    return PhasePlan(
        phase,
        choice,
        tokens,
        timed.serial_us,
        timed.paired_us,
        timed.step_us,
        memory,
        setting.layout,
        target,
        peak,
        balance,
    )


def _whole(form: Module, step: Step, options: Options, setting: Setting) -> StepCost:
    """The cost of a step, or of all chunks of a prompt."""
    if step.phase == "decode" or options.prompt <= options.chunk:
        return step_cost(form, step, setting)
    total = StepCost()
    for chunk, times in _chunks(step, options.prompt):
        total = total + step_cost(form, chunk, setting) * times
    return total


@dataclass(frozen=True)
class Timed:
    """A step in microseconds: one op after the other, as two micro-batches, as taken; layers of each stage."""

    serial_us: float
    paired_us: float | None
    step_us: float
    split: list[int]

    @property
    def overlapped(self) -> bool:
        """Whether the micro-batches overlap."""
        return self.paired_us is not None and self.step_us == self.paired_us


def time_step(form: Module, step: Step, cost: StepCost, overlap: str, setting: Setting) -> Timed:
    """The times of a step whose ops cost `cost`; `overlap` is auto, on or off.

    Two halves overlap where there are exchanges to hide and two sequences to part.
    """
    layout, target = setting.layout, setting.target
    paired = None
    if (layout.ep > 1 or layout.tp > 1) and step.sequences > 1 and overlap != "off":
        half = replace(step, sequences=-(-step.sequences // 2))
        paired = paired_segments(form, half, setting)
    size = step.tokens / layout.tp * hidden_size(form) * 2
    send = send_us(target, size, layout.ranks // layout.pp) if layout.pp > 1 else 0.0
    times = [layer_times(form, step.phase, segments) for segments in (cost.segment_us, paired) if segments is not None]
    found = [pipelined_us(each, layout.pp, send) for each in times]
    taken = {"auto": min(found), "on": found[-1], "off": found[0]}[overlap]
    split = split_layers(times[found.index(taken)], layout.pp)
    return Timed(found[0], found[1] if len(found) > 1 else None, taken, split)


def step_memory(module: Module, form: Module, step: Step, split: Sequence[int], setting: Setting) -> Memory:
    """Bytes of a device of the fullest stage; as many micro-batches are under way as there are stages."""
    layout, target = setting.layout, setting.target
    nodes = -(-layout.ep // target.node.devices)
    share = max(split) / sum(split) * layout.pp
    return Memory(
        sizes.weight_bytes(module, layout, setting.recipe, split),
        sizes.cache_bytes(module, step.sequences, step.context) * share,
        sizes.activation_bytes(form, step),
        sizes.buffer_bytes(layout, step, hidden_size(module), nodes),
        target.device.memory_bytes,
    )


def hidden_size(module: Module) -> int:
    """Width of the residual stream."""
    embed = next(op for op in module.functions["decode"].ops if op.name == "embed")
    t = embed.result.type
    assert isinstance(t, TensorType)
    return int(t.shape[1])  # type: ignore[arg-type]


def _slots_note(layout: Layout, options: Options) -> str:
    """How many redundant experts were taken, and how many would even out the loads better."""
    if options.layout.redundant is not None or layout.ep == 1:
        return ""
    extra, more = layout.slots - layout.experts, levelling_slots(layout.experts, layout.ep) - layout.experts
    fewest = f"{extra} redundant experts, the fewest that give each of {layout.ep} devices as many slots"
    if more > extra:
        limit, other = (placement_limit(layout.experts, layout.experts + n, layout.ep) for n in (extra, more))
        return f"{fewest}: the busiest device receives {limit:.2f} times the mean, with --redundant {more} {other:.2f}"
    return fewest if extra else ""


def _gain(
    built: Variants, key: str, options: Options, setting: Setting, phases: dict[str, PhasePlan]
) -> dict[str, float]:
    try:
        other = replace(setting, target=doubled(setting.target, key))
    except NoLink:
        return {}
    gains = {}
    for phase, plan in phases.items():
        step = step_of(phase, options)
        form = built[plan.choice.form]
        timed = time_step(form, step, _whole(form, step, options, other), options.overlap, other)
        gains[phase] = plan.step_us / timed.step_us - 1
    return gains


def _fit_warnings(
    module: Module, target: Target, recipe: Recipe, options: Options, phases: dict[str, PhasePlan]
) -> list[str]:
    found = []
    for phase, plan in phases.items():
        m = plan.memory
        if m.missing:
            text = f"{phase} does not fit: {m.total / 1e9:.1f} GB on a device of {m.capacity / 1e9:.1f} GB, "
            text += f"{m.missing / 1e9:.1f} GB too much; {_what_fits(module, target, recipe, options, plan)}"
            found.append(text)
    return found


def _what_fits(module: Module, target: Target, recipe: Recipe, options: Options, plan: PhasePlan) -> str:
    m = plan.memory
    name = "batch" if plan.phase == "decode" else "chunk"
    free = m.capacity - m.weights
    used = m.total - m.weights
    if free > 0 and (fits := int(getattr(options, name) * free / used)) >= 1:
        return f"{name} {fits} fits"
    nodes = target.node.devices
    for ranks in sorted({1 << i for i in range(nodes.bit_length())} | {nodes << i for i in range(10)}):
        if ranks <= plan.layout.ranks or not expert_count(module):
            continue
        asked = LayoutRequest(ranks=ranks, tp=plan.layout.tp)
        try:
            layout, _ = resolve(module, target, recipe, asked)
        except MoecError:
            continue
        if sizes.weight_bytes(module, layout, recipe) < m.capacity:
            return f"the weights fit on {ranks} ranks (--ranks {ranks})"
    return "its weights do not fit on more ranks of this target either; try another target or a smaller model"
