"""What each op of a function takes on one device, and which part of it is an exchange between devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import sqrt

from moec.ir import Function, Module, Op
from moec.ir.issue import entries, is_view
from moec.ir.mesh import mesh_of
from moec.passes.base import Context, PassError
from moec.passes.planning.precision import RECIPES, candidates
from moec.passes.planning.rank_rows import COLLECTIVES, rank_symbols
from moec.passes.planning.rows import COMMUNICATION, Step
from moec.passes.planning.timing import Setting, rows_of
from moec.targets import Target
from moec.targets.cost import Cost, op_time

_SHARES = (1.0, 0.75, 0.5)
"""Parts of the SMs that an exchange was measured with, which it may get by with; with fewer it takes longer."""


PROMPT_TILE = 128
"""Tokens that parts of a prompt are multiples of, the last one aside: rows of a tile of the products."""


@dataclass(frozen=True)
class OpTime:
    """Microseconds of an op at a share of the SMs.

    link_us: while the data are under way (0 for computation). send_us, receive_us: what an exchange keeps all SMs busy
    for around that. sms: what its kernel keeps for itself meanwhile. matrix_us: matrix units are busy. memory_us: of
    kernels that are bound by memory. bytes: device memory traffic of an exchange.
    """

    us: float = 0.0
    link_us: float = 0.0
    send_us: float = 0.0
    receive_us: float = 0.0
    sms: int = 0
    matrix_us: float = 0.0
    memory_us: float = 0.0
    bytes: float = 0.0

    @property
    def exchange(self) -> bool:
        """Whether the op is an exchange between devices."""
        return self.link_us > 0


@dataclass(frozen=True)
class Costs:
    """`at[n][op]`: the op with n SMs for computation, all `cores` or what exchanges leave.

    shares: (SMs, factor on `link_us`) that an exchange may choose from; (0, 1) when it needs none. slowed: factor on
    what is bound by memory while exchanges use the memory too.
    """

    at: Mapping[int, Mapping[Op, OpTime]]
    cores: int
    shares: tuple[tuple[int, float], ...] = ((0, 1.0),)
    slowed: float = 1.0

    @property
    def whole(self) -> Mapping[Op, OpTime]:
        """With all SMs and nothing beside."""
        return self.at[self.cores]

    def beside_us(self, op: Op, sms: int) -> float:
        """Computation with `sms` SMs while an exchange is under way."""
        time = self.at[sms][op]
        return time.us + time.memory_us * (self.slowed - 1)

    def serial_us(self, ops: list[Op]) -> float:
        """One op after the other, with all SMs."""
        return sum(self.whole[op].us for op in ops)


@dataclass(frozen=True)
class Part(Step):
    """The step of one micro-batch, whose symbols are `T0`, `S0`, ... for the first."""

    index: int = 0
    more: tuple[tuple[str, int], ...] = ()

    @property
    def symbols(self) -> dict[str, int]:
        """Values of the symbols, with and without the number of the micro-batch, and those that sharding brought."""
        plain = super().symbols
        return plain | {f"{name}{self.index}": value for name, value in plain.items()} | dict(self.more)


@dataclass(frozen=True)
class Work:
    """What the functions of a phase are costed for: the setting of the planner and the step of one micro-batch each."""

    setting: Setting
    steps: tuple[Part, ...]
    load: float = 0.0
    rank: bool = False
    """Whether the functions are sharded: their types are those of one rank."""
    stated: bool = False
    """Whether casts have been made: ops run in the precision of their own types, not in that of the recipe."""

    @property
    def parts(self) -> int:
        """Number of micro-batches."""
        return len(self.steps)

    def sized(self, function: Function) -> Work:
        """The work with values for the symbols that sharding brought into a function."""
        if not self.rank:
            return self
        top_k = next((int(str(op.attrs["top_k"])) for op in function.ops if op.name == "moe.route"), 1)
        steps = []
        for step in self.steps:
            balance = self.setting.balance_of(step, top_k)
            more = rank_symbols(function, step.tokens, step.index, top_k, balance)
            steps.append(replace(step, more=tuple(more.items())))
        return replace(self, steps=tuple(steps))


def work_of(
    module: Module, phase: str, ctx: Context, parts: int, balance: float = 0.0, prompt_parts: Sequence[int] = ()
) -> Work | None:
    """The work of a phase at the compiled limits, or None where no layout is known.

    balance: mean over maximum of the rows that devices receive; 0 for what the planner expects. prompt_parts: tokens of
    each part where prompts are split rather than batches.
    """
    if ctx.layout is None:
        return None
    named = str(module.attrs.get("recipe", ""))
    recipe = RECIPES[named] if named in RECIPES else candidates("auto", ctx.target)[0]
    setting = Setting(ctx.layout, recipe, ctx.target, balance or None)
    whole = whole_step(phase, ctx)
    steps = split_prompt(whole, prompt_parts) if prompt_parts else split_step(whole, parts)
    return Work(setting, steps, rank=mesh_of(module).ranks > 1, stated=True)


def whole_step(phase: str, ctx: Context) -> Step:
    """The greatest step that the module is compiled for."""
    limits = ctx.limits
    if phase == "decode":
        return Step(phase, limits.batch, 1, limits.context)
    prompt = min(limits.chunk, limits.context)
    return Step(phase, max(1, limits.chunk // prompt), prompt, prompt)


def wanted_entries(module: Module, phase: str, name: str) -> list[Function]:
    """The entries that a pass of that name is to schedule; raises PassError."""
    if phase not in ("both", "prefill", "decode"):
        raise PassError(name=name, message=f"phase must be prefill, decode or both, got {phase!r}")
    return [entry for entry in entries(module) if phase in ("both", entry.attrs.get("phase"))]


def prompt_parts(entry: Function) -> tuple[int, ...]:
    """Tokens of each part of an entry whose prompts were split, else ()."""
    found = entry.attrs.get("prompt_parts", ())
    return tuple(int(str(tokens)) for tokens in found) if isinstance(found, tuple) else ()


def split_step(step: Step, parts: int) -> tuple[Part, ...]:
    """The step in parts of as equal numbers of sequences as there can be; the larger ones first."""
    few, more = divmod(step.sequences, parts)
    sizes = [few + (k < more) for k in range(parts)]
    return tuple(Part(step.phase, size, step.new, step.context, k) for k, size in enumerate(sizes) if size)


def split_prompt(step: Step, tokens: Sequence[int]) -> tuple[Part, ...]:
    """The step in parts of every prompt: each attends to its own new tokens and to all before them."""
    ends = accumulate(tokens, initial=step.context - step.new)
    next(ends)
    parts = zip(tokens, ends, strict=True)
    return tuple(Part(step.phase, step.sequences, new, end, k) for k, (new, end) in enumerate(parts))


def prompt_cuts(step: Step, parts: int, linear_us: float, attention_us: float) -> tuple[int, ...]:
    """Tokens of each part of a prompt so that all take as long; () when it is too short to be split.

    Time up to a share x of the new tokens is linear * x, and attention's grows with the context before: of a causal
    prompt without a prefix as x * x.
    """
    if step.new < parts * PROMPT_TILE:
        return ()
    before = (step.context - step.new) / step.new
    bend, slope = attention_us / (1 + 2 * before), linear_us + attention_us * 2 * before / (1 + 2 * before)
    cuts = [0]
    for k in range(1, parts):
        load = (linear_us + attention_us) * k / parts
        share = load / slope if bend <= 0 else (sqrt(slope * slope + 4 * bend * load) - slope) / (2 * bend)
        cuts.append(max(cuts[-1] + 1, min(round(share * step.new / PROMPT_TILE), step.new // PROMPT_TILE - parts + k)))
    ends = [PROMPT_TILE * cut for cut in cuts] + [step.new]
    return tuple(b - a for a, b in pairwise(ends))


def op_costs(function: Function, work: Work) -> Costs:
    """Costs of all ops of a function; an op belongs to the step of its `micro_batch`."""
    target = replace(work.setting.target, load=min(work.load, 1.0))
    cores = int(target.device.cores)
    whole = _times(function, work, target)
    exchanges = [t for t in whole.values() if t.exchange]
    kept = max((t.sms for t in exchanges), default=0)
    shares = tuple((round(kept * s), 1 / s) for s in _SHARES) if kept else ((0, 1.0),)
    at = {cores: whole} | {
        cores - sms: _times(function, work, target.without_cores(sms)) for sms, _ in shares if 0 < sms < cores
    }
    traffic = max((t.bytes / t.link_us * 1e6 for t in exchanges), default=0.0)
    return Costs(at, cores, shares, 1 / max(0.1, 1 - traffic / target.device.memory_bandwidth))


def _times(function: Function, work: Work, target: Target) -> dict[Op, OpTime]:
    found: dict[Op, OpTime] = {op: OpTime() for op in function.ops}
    for step in work.sized(function).steps:

        def mine(op: Op, part: int = step.index) -> bool:
            return int(str(op.attrs.get("micro_batch", 0))) == part and not is_view(op)

        setting = replace(work.setting, target=target)
        for op, row in rows_of(function, step, setting, mine, work.rank, work.stated):
            found[op] = _added(found[op], str(row["op"]), op_time(row, target))
    return found


def _added(t: OpTime, row: str, cost: Cost) -> OpTime:
    """`t` followed by another kernel. Kernels before an exchange belong to its sending, those behind to its end."""
    us = t.us + cost.time_us
    if row not in (*COMMUNICATION, *COLLECTIVES):
        return replace(
            t,
            us=us,
            send_us=t.send_us + (0.0 if t.exchange else cost.time_us),
            receive_us=t.receive_us + (cost.time_us if t.exchange else 0.0),
            matrix_us=t.matrix_us + min(cost.parts.get("compute", 0.0), cost.time_us),
            memory_us=t.memory_us + (cost.time_us if cost.bound == "memory" else 0.0),
        )
    # A kernel that copies all the time holds its own SMs; one that only issues and receives takes all, for a while.
    busy = 0.0 if cost.sms else min(cost.busy_us, cost.time_us)
    return replace(
        t,
        us=us,
        link_us=t.link_us + cost.time_us - busy,
        send_us=t.send_us + busy / 2,
        receive_us=t.receive_us + busy / 2,
        sms=max(t.sms, cost.sms),
        bytes=t.bytes + cost.bytes,
    )
