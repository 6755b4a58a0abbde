"""Decode steps in micro-batches on several ranks: what exchanges cost when awaited, and what is left when hidden."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np

from moec.runtime.cache import Sequence
from moec.runtime.distributed.card import Card
from moec.runtime.distributed.engine import DistributedEngine
from moec.runtime.distributed.model import DistributedModel
from moec.runtime.distributed.overlapped import Overlapped
from moec.runtime.engine import Ids
from moec.runtime.plan import Plan
from moec.runtime.steps import Collective, flat

STEPS = 4
"""Decode steps in a row, from the same caches every time."""

_AWAITED, _HIDDEN = 1, 2

Ran = tuple[str, str, float, float]
"""What a rank did: name, stream (see `overlapped.Ran`), start and duration in microseconds of the step."""


@dataclass(frozen=True)
class OverlapResult:
    """Milliseconds of a decode step, medians over runs of the slowest rank; exchanges are means over the ranks.

    whole_ms: all sequences as one batch. awaited_ms, hidden_ms: in `parts` micro-batches, waiting for each exchange at
    once and behind the computation of another micro-batch. exchange_ms: what the ranks waited in exchanges when they
    awaited them, exposed_ms: what they still waited when hiding them. sent_bytes: what a rank sends in a step.
    link_gbit: the emulated card of each rank, None where data travels as the machine's processes exchange it.
    scheduled: as the artifact's schedule says; else micro-batches change at every exchange. same_logits: awaited and
    hidden, bit for bit, on all ranks.
    """

    parts: int
    scheduled: bool
    sequences: int
    link_gbit: float | None
    whole_ms: float
    awaited_ms: float
    hidden_ms: float
    exchange_ms: float
    exposed_ms: float
    sent_bytes: int
    whole_runs: list[float]
    awaited_runs: list[float]
    hidden_runs: list[float]
    same_logits: bool
    ran: list[list[Ran]] = field(default_factory=list, repr=False)
    """The last hidden step of every rank."""


@dataclass
class _Kind:
    """A way to decode, and what was measured of it on this rank: seconds a step and waited seconds of each run."""

    overlapped: Overlapped | None
    hide: bool = False
    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)
    ran: list[Ran] = field(default_factory=list)


def unsuited(model: DistributedModel, sequences: int) -> str:
    """Why `sequences` on all ranks leave nothing to overlap, or ""."""
    plan = model.artifact.plan
    if not isinstance(plan, Plan):
        return "ranks on GPUs run their exchanges between kernels"
    if not any(isinstance(s, Collective) and s.name in ("dispatch", "combine") for s in flat(plan.decode.steps)):
        return "no exchange between experts on different ranks"
    if plan.mesh.pp > 1:
        return "ranks of a pipeline wait for each other, not for exchanges"
    if sequences < 2 * model.replicas:
        return f"no second micro-batch of {sequences} sequences on {model.replicas} replicas; --batch gives more"
    return ""


def bench_overlap(model: DistributedModel, ids: Ids, repeat: int, link_gbit: float | None) -> OverlapResult:
    """Time decode steps of `ids` int64[B, T] on every rank, `repeat` runs of each kind in turn after one that warms up.

    Every rank calls it alike; all get the same result. An emulated card of `link_gbit` serves from here on.
    """
    engine, plan = model.engine, model.artifact.plan
    assert isinstance(plan, Plan) and isinstance(engine, DistributedEngine)
    turns = plan.decode.turns
    parts = plan.decode.parts if turns else 2
    if link_gbit is not None:
        Card(link_gbit).serve(model.world.axes.values())
    given, replica = engine.overlapped, model.replica
    micro = given or Overlapped(engine, parts, turns=turns)
    kinds = [_Kind(None), _Kind(micro, hide=False), _Kind(micro, hide=True)]
    engine.overlapped = None
    engine.use_threads()
    mine = ids[replica[0] :: replica[1]]
    sequences = [engine.pool.open() for _ in mine]
    for sequence, prompt in zip(sequences, mine, strict=True):
        for start in range(0, len(prompt), engine.chunk):
            engine.prefill(sequence, prompt[start : start + engine.chunk])
    engine.drain()
    tokens = np.random.default_rng(1).integers(0, model.vocab, (STEPS, len(ids)))[:, replica[0] :: replica[1]].tolist()
    try:
        before = _sent(model)
        _run(engine, kinds[0], sequences, tokens)
        sent = (_sent(model) - before) // STEPS
        for run in range(repeat + 1):
            for kind in kinds:
                _run(engine, kind, sequences, tokens, keep=run > 0)
    finally:
        micro.ran, micro.hide, engine.overlapped = None, True, given
        for sequence in sequences:
            engine.pool.close(sequence)
    mine_told = [(k.seconds, k.waited, sorted(k.digests), k.ran) for k in kinds]
    return _joined(model.world.gather((mine_told, sent)), parts, bool(turns), len(ids), link_gbit)


def _run(
    engine: DistributedEngine, kind: _Kind, sequences: List[Sequence], tokens: List[List[int]], keep: bool = False
) -> None:
    """STEPS decode steps; the sequences are as before afterwards."""
    engine.overlapped = kind.overlapped
    if kind.overlapped is not None:
        kind.overlapped.hide = kind.hide
    digest, seconds, waited = hashlib.sha256(), [], 0.0
    for given in tokens:
        if kind.overlapped is not None:
            kind.overlapped.ran = []
        engine.world.agree(0)  # all ranks begin together
        began = perf_counter()
        logits = engine.decode(sequences, given)
        seconds.append(perf_counter() - began)
        digest.update(np.ascontiguousarray(logits).tobytes())
        if kind.overlapped is not None:
            ran = kind.overlapped.ran or []
            waited += sum(r.end - r.start for r in ran if r.stream == "wait")
            kind.ran = [(r.name, r.stream, (r.start - began) * 1e6, (r.end - r.start) * 1e6) for r in ran]
    for sequence in sequences:
        sequence.length -= STEPS
    kind.digests.add(digest.hexdigest())
    if keep:
        kind.seconds.append(median(seconds))
        kind.waited.append(waited / STEPS)


def _sent(model: DistributedModel) -> int:
    return sum(int(axis.sent.sum()) for axis in model.world.axes.values())


def _joined(told: list[Any], parts: int, scheduled: bool, sequences: int, link_gbit: float | None) -> OverlapResult:
    """What all ranks measured as one result: a step lasts as long as on the slowest rank."""
    ranks = [kinds for kinds, _ in told]

    def runs(kind: int) -> list[float]:
        return [max(each) * 1e3 for each in zip(*(rank[kind][0] for rank in ranks), strict=True)]

    def waited(kind: int) -> float:
        return float(median(mean(each) * 1e3 for each in zip(*(rank[kind][1] for rank in ranks), strict=True)))

    digests = [rank[kind][2] for rank in ranks for kind in (_AWAITED, _HIDDEN)]
    same = all(len(d) == 1 for d in digests) and digests[::2] == digests[1::2]
    whole, awaited, hidden = runs(0), runs(_AWAITED), runs(_HIDDEN)
    return OverlapResult(
        parts=parts,
        scheduled=scheduled,
        sequences=sequences,
        link_gbit=link_gbit,
        whole_ms=median(whole),
        awaited_ms=median(awaited),
        hidden_ms=median(hidden),
        exchange_ms=waited(_AWAITED),
        exposed_ms=waited(_HIDDEN),
        sent_bytes=max(sent for _, sent in told),
        whole_runs=whole,
        awaited_runs=awaited,
        hidden_runs=hidden,
        same_logits=same,
        ran=[rank[_HIDDEN][3] for rank in ranks],
    )
