"""The task graph of a layer: runs of ops between exchanges, cut into pieces that the scheduler moves about.

Ops that wait for the same exchanges and that the same exchanges wait for belong together: attention up to dispatch,
the experts, the shared expert, what follows combine. Long ones are cut at op boundaries (attention in two parts, and
finer), so that the scheduler finds how much of them fits beside an exchange.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from moec.ir import CacheType, Function, Op, Value
from moec.ir.issue import cache_part
from moec.passes.scheduling import Mode, Task, TaskGraph
from moec.passes.streams.costs import Costs, OpTime

COMPUTE, LINK, SMS = "compute", "link", "sm"
SEND, RECEIVE = "send", "receive"


@dataclass
class Block:
    """Ops that run one after the other; an exchange is a block of its own."""

    name: str
    ops: list[Op]
    exchange: bool = False


@dataclass
class LayerTasks:
    """`graph` is cyclic where the layer repeats; `blocks` by task name; `of` names the task that an op belongs to."""

    graph: TaskGraph
    blocks: dict[str, Block]
    of: dict[Op, str] = field(default_factory=dict)


def layer_tasks(function: Function, costs: Costs, pieces: int = 4, cyclic: bool = True) -> LayerTasks:
    """The task graph of a layer whose ops carry `micro_batch`; a run of ops is cut into at most `pieces`."""
    before = _dependencies(function)
    blocks = _blocks(function, costs, before, pieces)
    of = {op: block.name for block in blocks for op in block.ops}
    tasks: list[Task] = []
    edges: dict[tuple[str, str], None] = {}
    for block in blocks:
        tasks += _tasks(block, costs)
        if block.exchange:
            edges.update({pair: None for pair in _chain(block, costs.whole[block.ops[0]])})
    first, last = _ends(blocks, costs)
    for op, sources in before.items():
        for source in sources:
            a, b = of[source], of[op]
            if a != b:
                edges[last[a], first[b]] = None
    repeat = _repeats(function, of, first, last) if cyclic else ()
    resources = {COMPUTE: 1.0, LINK: 1.0} | ({SMS: float(costs.cores)} if costs.shares[0][0] else {})
    graph = TaskGraph(resources, tuple(tasks), tuple(edges), repeat, frozenset({LINK}))
    return LayerTasks(graph, {b.name: b for b in blocks}, of)


def _dependencies(function: Function) -> dict[Op, list[Op]]:
    """What each op waits for: who makes its operands, and within a micro-batch or prompt the cache's last writer."""
    made = function.producer()
    written: dict[tuple[Value, object], Op] = {}
    found: dict[Op, list[Op]] = {}
    for op in function.ops:
        sources = dict.fromkeys(made[v] for v in op.values() if v in made)
        for value in op.values():
            if isinstance(value.type, CacheType):
                key = value, cache_part(function, op)
                if key in written:
                    sources[written[key]] = None
                if op.name.startswith("cache.append"):
                    written[key] = op
        found[op] = list(sources)
    return found


def _blocks(function: Function, costs: Costs, before: dict[Op, list[Op]], pieces: int) -> list[Block]:
    exchanges = [op for op in function.ops if costs.whole[op].exchange]
    above = _reach(function.ops, before, exchanges)
    after: dict[Op, list[Op]] = {op: [] for op in function.ops}
    for op, sources in before.items():
        for source in sources:
            after[source].append(op)
    below = _reach(function.ops[::-1], after, exchanges)
    runs: dict[object, list[Op]] = {}
    for op in function.ops:
        key: object = op if costs.whole[op].exchange else (op.attrs.get("micro_batch"), above[op], below[op])
        runs.setdefault(key, []).append(op)
    total = costs.serial_us(function.ops)
    blocks: list[Block] = []
    for ops in runs.values():
        if costs.whole[ops[0]].exchange:
            blocks.append(Block(_name(ops[0], blocks), ops, exchange=True))
            continue
        for part in _cut(ops, costs, pieces, total):
            blocks.append(Block(_name(_longest(part, costs), blocks), part))
    return blocks


def _reach(order: Sequence[Op], sources: dict[Op, list[Op]], marked: Sequence[Op]) -> dict[Op, frozenset[int]]:
    """Which of the marked ops each op is connected with through `sources`, itself left out."""
    number = {op: i for i, op in enumerate(marked)}
    found: dict[Op, frozenset[int]] = {}
    for op in order:
        reached: set[int] = set()
        for source in sources[op]:
            reached |= found[source] | ({number[source]} if source in number else set())
        found[op] = frozenset(reached)
    return found


def _cut(ops: list[Op], costs: Costs, pieces: int, total: float) -> list[list[Op]]:
    """The ops in at most `pieces` consecutive parts whose longest is as short as possible; short runs stay whole."""
    times = [costs.whole[op].us for op in ops]
    count = min(pieces, max(1, round(sum(times) / (0.06 * total)))) if total else 1
    best = [0.0, *([float("inf")] * len(ops))]
    cuts: list[list[int]] = [[] for _ in range(len(ops) + 1)]
    for _ in range(count):
        new, where = best.copy(), [c.copy() for c in cuts]
        for j in range(1, len(ops) + 1):
            for i in range(j):
                longest = max(best[i], sum(times[i:j]))
                if longest < new[j] - 1e-9:
                    new[j], where[j] = longest, [*cuts[i], i]
        best, cuts = new, where
    bounds = [*cuts[-1], len(ops)]
    return [ops[a:b] for a, b in itertools.pairwise(bounds) if a < b]


def _longest(ops: list[Op], costs: Costs) -> Op:
    return max(ops, key=lambda op: costs.whole[op].us)


def _name(op: Op, blocks: list[Block]) -> str:
    """The op that takes longest names the block: `attn.mla_absorbed.0` for micro-batch 0."""
    weight = next((repr(o)[1:] for o in op.operands if not isinstance(o, Value)), "")
    base = op.name if op.name not in ("linear", "linear.heads") else weight.rsplit(".", 2)[-1] or op.name
    if "shared" in weight:
        base = "shared"
    part = f".{op.attrs['micro_batch']}" if "micro_batch" in op.attrs else ""
    taken = {b.name for b in blocks}
    name, count = f"{base}{part}", 1
    while name in taken:
        count += 1
        name = f"{base}'{count}{part}"
    return name


def _tasks(block: Block, costs: Costs) -> list[Task]:
    divided = costs.shares[0][0] > 0
    if not block.exchange:
        if not divided:
            us = sum(costs.beside_us(op, costs.cores) for op in block.ops)
            return [Task(block.name, (Mode(us, {COMPUTE: 1}),))]
        modes = [Mode(costs.serial_us(block.ops), {COMPUTE: 1, SMS: costs.cores}, costs.cores)]
        for sms in sorted((n for n in costs.at if n < costs.cores), reverse=True):
            us = sum(costs.beside_us(op, sms) for op in block.ops)
            modes.append(Mode(us, {COMPUTE: 1, SMS: sms}, sms))
        return [Task(block.name, tuple(modes))]
    time = costs.whole[block.ops[0]]

    def around(us: float) -> tuple[Mode, ...]:
        """Kernels before or behind the exchange, which share SMs with other exchanges as all computation does."""
        if not divided:
            return (Mode(us, {COMPUTE: 1}),)
        return tuple(
            Mode(us if sms == costs.cores else us * costs.slowed, {COMPUTE: 1, SMS: sms}, sms)
            for sms in sorted(costs.at, reverse=True)
        )

    shares = [
        Mode(time.link_us * factor, {LINK: 1} | ({SMS: sms} if sms else {}), sms or None)
        for sms, factor in costs.shares
    ]
    found = [Task(block.name, tuple(shares))]
    if time.send_us:
        found.insert(0, Task(f"{block.name}:{SEND}", around(time.send_us)))
    if time.receive_us:
        found.append(Task(f"{block.name}:{RECEIVE}", around(time.receive_us)))
    return found


def _chain(block: Block, time: OpTime) -> list[tuple[str, str]]:
    pairs = []
    if time.send_us:
        pairs.append((f"{block.name}:{SEND}", block.name))
    if time.receive_us:
        pairs.append((block.name, f"{block.name}:{RECEIVE}"))
    return pairs


def _ends(blocks: list[Block], costs: Costs) -> tuple[dict[str, str], dict[str, str]]:
    """The first and the last task of each block."""
    first, last = {}, {}
    for block in blocks:
        time = costs.whole[block.ops[0]]
        first[block.name] = f"{block.name}:{SEND}" if block.exchange and time.send_us else block.name
        last[block.name] = f"{block.name}:{RECEIVE}" if block.exchange and time.receive_us else block.name
    return first, last


def _repeats(
    function: Function, of: dict[Op, str], first: dict[str, str], last: dict[str, str]
) -> tuple[tuple[str, str, int], ...]:
    """State that a layer returns is what the next one starts from."""
    made = function.producer()
    users = function.uses()
    found: dict[tuple[str, str, int], None] = {}
    for arg, returned in zip(function.args[1:], function.returns, strict=False):
        if returned in made:
            for user in users.get(arg, []):
                found[last[of[made[returned]]], first[of[user]], 1] = None
    return tuple(found)
