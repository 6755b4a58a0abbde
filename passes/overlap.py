"""overlap: put the exchanges of a layer on a stream of their own and find the order in which they hide."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from moec.figures import figures
from moec.ir import Function, Module, Op
from moec.ir.issue import scheduled
from moec.ir.rewrite import fresh_names
from moec.passes.base import Context, Outcome, Pass, PassError
from moec.passes.planning import memory
from moec.passes.streams.buffers import assign_buffers
from moec.passes.streams.costs import Costs, Work, op_costs, prompt_parts, wanted_entries, work_of
from moec.passes.streams.events import add_events
from moec.passes.streams.figure import layer_figure
from moec.passes.streams.layer import EFFORT, LayerSchedule, schedule_layer
from moec.passes.streams.rotate import Rounds, rotate
from moec.passes.streams.tasks import LayerTasks, layer_tasks


@dataclass(frozen=True)
class Overlap(Pass):
    """Order the ops of repeated layers on two streams so that exchanges between devices run beside computation.

    Consumes layer functions with exchanges that a `repeat` calls, split into micro-batches or not; produces, where it
    pays, a prologue, a kernel for the range of layers and an epilogue (software pipelining), every op with its
    `stream`, SM share and predicted time, events between the streams, and buffers that are safe whatever anything
    takes. Results do not change. `pieces` is the most parts that a run of ops is cut into, `effort` a factor on the
    search's amount of work, `balance` the mean over the maximum of the rows that devices receive (0: as expected),
    `phase` prefill, decode or both.
    """

    name: ClassVar[str] = "overlap"
    schedules: ClassVar[bool] = True
    pieces: int = 4
    effort: float = EFFORT
    balance: float = 0.0
    phase: str = "both"

    def requires(self, module: Module) -> str:
        """A schedule is made once: ops that have streams are in it already."""
        return "the module has a schedule already" if scheduled(module) else ""

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        if self.pieces < 1:
            raise PassError(name=self.name, message=f"pieces must be at least 1, got {self.pieces}")
        if ctx.layout is None or ctx.layout.ranks == 1:
            out.notes.append("one device: there is no exchange to hide")
            return out
        for entry in wanted_entries(module, self.phase, self.name):
            self._entry(module, entry, ctx, out)
        if not out.matched and not out.notes:
            out.warnings.append("no repeated layer has an exchange between devices: nothing to overlap")
        return out

    def ensures(self, module: Module) -> str:
        """Every op of a scheduled function has a stream."""
        for function in module.functions.values():
            bare = [op.name for op in function.ops if "stream" not in op.attrs and op.name != "index.affine"]
            if "interval_us" in function.attrs and bare:
                return f"@{function.name}: {bare[0]} has no stream"
        return ""

    def _entry(self, module: Module, entry: Function, ctx: Context, out: Outcome) -> None:
        parts = int(str(entry.attrs.get("micro_batches", 1)))
        work = work_of(module, str(entry.attrs.get("phase", "")), ctx, parts, self.balance, prompt_parts(entry))
        assert work is not None
        origin: dict[Op, Op] = {}
        for op in [o for o in entry.ops if o.name == "repeat"]:
            function = module.functions[str(op.attrs["func"])]
            found = self.schedule(function, work)
            if found is None:
                continue
            rounds = rotate(module, function, found.timing(), found.interval_us)
            layers = int(str(op.attrs["last"])) - int(str(op.attrs["first"])) + 1
            if rounds.depth >= layers:
                out.notes.append(f"@{function.name}: {layers} layers are too few for a pipeline of {rounds.depth + 1}")
                continue
            _replace(module, entry, op, rounds)
            origin.update(rounds.origin)
            rounds.kernel.attrs |= {"interval_us": round(found.interval_us, 3), "bound_us": round(found.bound_us, 3)}
            out.matched += 1
            out.notes.append(f"@{function.name}: {describe(found, rounds)}")
            out.figures.append(layer_figure(found, f"@{function.name}: two layers of the steady state"))
        _time_rest(module, entry, work)
        if origin:
            events = add_events(module, entry, origin)
            sizes = {name: value for step in work.steps for name, value in step.symbols.items()}
            used = {s for f in module.functions.values() for o in f.ops for r in o.results for s in r.type.symbols()}
            total = assign_buffers(module, entry, origin, {k: v for k, v in sizes.items() if k in used})
            out.notes.append(f"@{entry.name}: {events} events, {figures(total / 1e6)} MB in buffers")
            room = _room(module, work)
            if total <= room:
                entry.attrs["memory_bytes"] = room
            else:
                left = figures(max(room, 0) / 1e6)
                text = f"buffers take {figures(total / 1e6)} MB, weights and cache leave {left} MB a device"
                out.warnings.append(f"@{entry.name}: {text}")

    def schedule(self, function: Function, work: Work) -> LayerSchedule | None:
        """The schedule of a layer function; None without exchanges."""
        found = self.tasks(function, work)
        return None if found is None else schedule_layer(function, *found, self.effort)

    def tasks(self, function: Function, work: Work) -> tuple[Costs, LayerTasks] | None:
        """What a layer function is scheduled from; None without exchanges. Clocks follow the matrix units' load."""
        costs = op_costs(function, work)
        if not any(t.exchange for t in costs.whole.values()):
            return None
        costs = op_costs(function, replace(work, load=matrix_load(function, costs)))
        return costs, layer_tasks(function, costs, self.pieces)


def _room(module: Module, work: Work) -> int:
    """Bytes of a device that weights and caches leave."""
    setting = work.setting
    sequences = sum(step.sequences for step in work.steps)
    held = memory.weight_bytes(module, setting.layout, setting.recipe)
    held += memory.cache_bytes(module, sequences, work.steps[0].context)
    return int(setting.target.device.memory_bytes - held)


def matrix_load(function: Function, costs: Costs) -> float:
    """Share of a layer's time in which matrix units are busy, if all that can hide does."""
    times = [costs.whole[op] for op in function.ops]
    compute = sum(t.send_us + t.receive_us if t.exchange else t.us for t in times)
    links = sum(t.link_us for t in times)
    matrix = sum(t.matrix_us for t in times)
    return matrix / max(compute, links, 1e-9)


def describe(found: LayerSchedule, rounds: Rounds) -> str:
    """One line: interval, bound, what is hidden, SMs, pipeline depth."""
    gap = found.interval_us / found.bound_us - 1 if found.bound_us else 0.0
    proven = "proven least" if found.solution.optimal else f"bound {found.bound_us:.1f} us, gap {gap:.2%}"
    hidden = 1 - found.exposed_us / found.communication_us if found.communication_us else 1.0
    text = f"a layer every {found.interval_us:.1f} us ({proven}), one after the other {found.serial_us:.1f} us; "
    text += f"{hidden:.1%} of {found.communication_us:.1f} us communication hidden"
    if found.sms:
        text += f", {found.sms} of {found.costs.cores} SMs for it"
    return text + f"; {rounds.depth + 1} stages"


def _replace(module: Module, entry: Function, op: Op, rounds: Rounds) -> None:
    """Call prologue, kernel and epilogue in place of the repeated layer."""
    first, last = int(str(op.attrs["first"])), int(str(op.attrs["last"]))
    state = len(op.results)
    shared = op.operands[state:]
    new: list[Op] = []
    operands = op.operands

    def add(name: str, function: Function, **attrs: int) -> None:
        nonlocal operands
        from moec.ir import Value

        results = [Value("r", v.type) for v in function.returns]
        new.append(Op(name, operands, {"func": function.name, **attrs}, results, op.loc))
        operands = [*results, *shared]

    if rounds.prologue is not None:
        add("call", rounds.prologue, layer=first)
    add("repeat", rounds.kernel, first=first + rounds.depth, last=last)
    if rounds.epilogue is not None:
        add("call", rounds.epilogue, layer=last)
    new[-1].results = op.results
    at = entry.ops.index(op)
    entry.ops[at : at + 1] = new
    del module.functions[str(op.attrs["func"])]
    del module.functions[entry.name]
    for function in (rounds.prologue, rounds.kernel, rounds.epilogue, entry):
        if function is not None:
            module.functions[function.name] = function
    fresh_names(entry)


def _time_rest(module: Module, entry: Function, work: Work) -> None:
    """Predicted times of the ops that no schedule has placed: they run one after the other."""
    called = [module.functions[str(op.attrs["func"])] for op in entry.ops if op.name in ("call", "repeat")]
    for function in dict.fromkeys([entry, *called]):
        if any("stream" in op.attrs for op in function.ops):
            continue
        for op, time in op_costs(function, work).whole.items():
            if time.us:
                op.attrs["us"] = round(time.us, 3)
