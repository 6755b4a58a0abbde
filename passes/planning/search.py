"""The best layout of a model on a number of devices, under limits on latency and memory.

Every layout that the devices allow is tried: tensor, data, expert and pipeline parallelism, replicas of experts. For
each the largest batch is found that fits the memory and meets the latency, one after the other or as two micro-batches,
whichever is faster. What comes out is a ranking by tokens/s of a device, and the Pareto front of latency against rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moec.errors import MoecError
from moec.ir import Module
from moec.passes.planning.errors import NothingFits
from moec.passes.planning.forms import Variants, variants
from moec.passes.planning.layout import Layout, LayoutRequest, expert_count, layer_count, levelling_slots, resolve
from moec.passes.planning.memory import Memory, weight_bytes
from moec.passes.planning.pipelining import split_layers
from moec.passes.planning.plan import Options, step_memory, time_step
from moec.passes.planning.precision import Recipe, candidates
from moec.passes.planning.rows import Step
from moec.passes.planning.timing import Setting, routed_to, step_cost
from moec.targets import Target

_STAGES = (1, 2, 3, 4, 6, 8, 12, 16)
_MOST_BATCH = 1 << 15
# Slots a device beyond the fewest: further replicas only take memory.
_EXTRA_SLOTS = 2
# Ratio of neighbouring batches on the Pareto front.
_STEP = 1.5


@dataclass(frozen=True)
class Candidate:
    """A layout with a batch: `batch` requests of a replica and micro-batch (prefill: prompts of a step).

    time_us: between two tokens of a request (prefill: until the first). per_device: tokens/s.
    """

    layout: Layout
    batch: int
    overlapped: bool
    form: str
    time_us: float
    per_device: float
    memory: Memory
    balance: float

    @property
    def requests(self) -> int:
        """Requests under way on all devices."""
        return self.batch * self.layout.dp * self.layout.pp


@dataclass(frozen=True)
class Found:
    """`ranking`: each layout at its best batch, best first. `front`: candidates that no other beats in both time and
    rate, fastest first. `asked`: the layout and batch of the options, where they are feasible. `tried`: evaluations."""

    ranking: list[Candidate]
    front: list[Candidate]
    asked: Candidate | None
    rank: int | None
    layouts: int
    tried: int


def search(module: Module, target: Target, options: Options, phase: str, limit_us: float) -> Found:
    """Search the layouts of the options' ranks (the target's) for one phase; raises NothingFits.

    limit_us: greatest time of a token (prefill: of the first), inf for none. The options' own layout is ranked among
    the others, at its best batch; `asked` has it at the options' batch.
    """
    recipe = candidates(options.recipe, target)[0]
    own, sized = resolve(module, target, recipe, options.layout)
    bench = Bench(module, sized, recipe, options, phase, limit_us)
    ranking: list[Candidate] = []
    points: list[Candidate] = []
    layouts = list(_layouts(module, sized, recipe, own))
    for layout in layouts:
        found = bench.batches(layout)
        points += found
        if found:
            ranking.append(max(found, key=lambda c: c.per_device))
    if not ranking:
        raise NothingFits(
            model_ranks=own.ranks, target=target.name, tried=len(layouts), limit=_limit_text(phase, limit_us)
        )
    ranking.sort(key=lambda c: (-c.per_device, c.time_us))
    rank = next((i + 1 for i, c in enumerate(ranking) if c.layout == own), None)
    asked = bench.at(own, batch_of(options, phase))
    return Found(ranking, _front(points), asked, rank, len(layouts), bench.tried)


def batch_of(options: Options, phase: str) -> int:
    """Requests of a decode step, or prompts of a prefill step, as the options ask."""
    return options.batch if phase == "decode" else max(1, options.chunk // options.prompt)


def _limit_text(phase: str, limit_us: float) -> str:
    what = "a token" if phase == "decode" else "the first token"
    return "" if math.isinf(limit_us) else f" within {limit_us / 1e3:g} ms for {what}"


def _front(points: Sequence[Candidate]) -> list[Candidate]:
    best, found = 0.0, []
    for point in sorted(points, key=lambda c: (c.time_us, -c.per_device)):
        if point.per_device > best:
            best = point.per_device
            found.append(point)
    return found


def _layouts(module: Module, target: Target, recipe: Recipe, own: Layout) -> Iterator[Layout]:
    """Layouts of the ranks that the model allows and whose weights fit; expert groups fill nodes or divide them."""
    ranks, node, experts = own.ranks, target.node.devices, expert_count(module)
    seen = set()
    for pp in (p for p in _STAGES if ranks % p == 0 and p <= layer_count(module)):
        stage = ranks // pp
        if stage % node and node % stage:
            continue
        for tp in (t for t in range(1, min(node, stage) + 1) if stage % t == 0 and node % t == 0):
            groups = [e for e in range(1, stage + 1) if stage % e == 0 and (e % node == 0 or node % e == 0)]
            for ep in groups if experts else [1]:
                fewest = -experts % ep
                least = max(fewest, levelling_slots(experts, ep) - experts) if experts else 0
                for extra in sorted({fewest, *(least + k * ep for k in range(_EXTRA_SLOTS))} if ep > 1 else {0}):
                    asked = LayoutRequest(ranks=ranks, tp=tp, ep=ep, pp=pp, redundant=extra if experts else None)
                    try:
                        layout, _ = resolve(module, target, recipe, asked)
                    except MoecError:
                        continue
                    seen.add(layout)
    seen.add(own)
    for layout in sorted(seen, key=lambda x: (x.pp, x.tp, -x.ep, x.slots)):
        split = split_layers([1.0] * layer_count(module), layout.pp)
        if weight_bytes(module, layout, recipe, split) < target.device.memory_bytes:
            yield layout


class Bench:
    """Evaluates layouts and batches of one question; with `whatever_fits` those too that exceed the memory."""

    def __init__(
        self,
        module: Module,
        target: Target,
        recipe: Recipe,
        options: Options,
        phase: str,
        limit_us: float,
        whatever_fits: bool = False,
    ) -> None:
        self._any = whatever_fits
        self._module, self._target, self._recipe = module, target, recipe
        self._options, self._phase, self._limit = options, phase, limit_us
        self._built: dict[int, Variants] = {}
        self._forms: dict[tuple[int, int], str] = {}
        self.tried = 0

    def batches(self, layout: Layout) -> list[Candidate]:
        """Feasible batches: growing by half, and the largest that still is."""
        found: list[Candidate] = []
        batch, failed = 1, 0
        while batch <= _MOST_BATCH and not failed:
            candidate = self.at(layout, batch)
            if candidate is None:
                failed = batch
            else:
                found.append(candidate)
                batch = max(batch + 1, round(batch * _STEP))
        if not found:
            return []
        low, high = found[-1].batch, failed or _MOST_BATCH
        while high - low > max(1, low // 32):
            middle = (low + high) // 2
            candidate = self.at(layout, middle)
            if candidate is None:
                high = middle
            else:
                found.append(candidate)
                low = middle
        return found

    def at(self, layout: Layout, batch: int) -> Candidate | None:
        """One layout and batch; None when it does not fit or takes too long."""
        self.tried += 1
        o, module = self._options, self._module
        decode = self._phase == "decode"
        step = Step("decode", batch, 1, o.context) if decode else Step("prefill", batch, o.prompt, o.prompt)
        setting = Setting(layout, self._recipe, self._target, o.balance)
        form = self._form(step, setting)
        built = self._built[layout.tp][form]
        timed = time_step(built, step, step_cost(built, step, setting), o.overlap, setting)
        if timed.step_us > self._limit:
            return None
        memory = step_memory(module, built, step, timed.split, setting)
        if memory.missing and not self._any:
            return None
        rate = step.tokens / layout.tp / timed.step_us * 1e6
        balance = setting.balance_of(step, routed_to(module))
        return Candidate(layout, batch, timed.overlapped, form, timed.step_us, rate, memory, balance)

    def _form(self, step: Step, setting: Setting) -> str:
        """The cheaper form of attention, judged once for each degree of tensor parallelism and size of batch."""
        tp = setting.layout.tp
        if tp not in self._built:
            self._built[tp] = variants(self._module, setting)
        key = (tp, step.sequences.bit_length())
        if key not in self._forms:
            alone = replace(setting, balance=1.0)
            costs = {form: step_cost(built, step, alone).serial_us for form, built in self._built[tp].items()}
            self._forms[key] = min(costs, key=lambda form: costs[form])
        return self._forms[key]
