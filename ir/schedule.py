"""What must hold of a schedule: every wait has its signal, every use its wait, every buffer one owner at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from moec.errors import MoecError
from moec.ir.dims import Dim, bind
from moec.ir.issue import CALLS, Issued, Storage, Tracer, cache_layer, cache_part, entries, is_cache, is_view, scheduled
from moec.ir.module import Function, Module, Op
from moec.ir.printer import print_op
from moec.ir.types import TensorType

ROUNDS = 3
"""Layers of a `repeat` that are looked at: orders between neighbours follow for all others."""

Fail = Callable[[Function, int, str], MoecError]
"""Makes the error for a message about the op at a position."""


def check_schedule(module: Module, fail: Fail) -> None:
    """Raise `fail(...)` unless the streams and events of a scheduled module keep all dependencies and buffers.

    Results then do not depend on how long anything takes. Modules without streams pass.
    """
    if scheduled(module):
        for entry in entries(module):
            _Check(module, entry, fail).run()


class _Check:
    def __init__(self, module: Module, entry: Function, fail: Fail) -> None:
        self._module, self._entry, self._fail = module, entry, fail
        self._tracer = Tracer(module, ROUNDS)
        self._held: dict[int, Storage] = {}
        self._written: dict[tuple[Storage, object], Issued] = {}
        self._read: dict[tuple[Storage, object, bool], list[Issued]] = {}
        self._bytes = _numbers(entry, "buffer_bytes")
        self._sizes = dict(part.split("=") for part in _texts(entry, "sizes"))

    def run(self) -> None:
        memory = self._entry.attrs.get("memory_bytes")
        if isinstance(memory, int) and sum(self._bytes) > memory:
            text = f"its buffers take {sum(self._bytes)} bytes, the plan allows {memory}"
            raise self._fail(self._entry, -1, text)
        for issued in self._tracer.run(self._entry):
            if issued.op.name == "event.wait":
                self._wait(issued)
            elif issued.op.name != "event.record" and not is_view(issued.op):
                self._uses(issued)
                self._cache(issued)
                self._results(issued)

    def _refuse(self, issued: Issued, message: str) -> NoReturn:
        raise self._fail(issued.function, issued.position, message)

    def _wait(self, issued: Issued) -> None:
        event = int(str(issued.op.attrs["event"]))
        if event in self._tracer.events:
            return
        if cycle := _cycle(issued.function, issued.position):
            shown = " -> ".join(_short(op) for op in cycle)
            self._refuse(issued, f"streams wait for each other: {shown}; each goes on only after the next")
        if any(_same_event(op, issued.op) for _, op in self._module.ops()):
            self._refuse(issued, f"waits for event {event}, which is recorded only behind this line")
        self._refuse(issued, f"waits for event {event}, which nothing records: add event.record behind the op meant")

    def _uses(self, issued: Issued) -> None:
        for storage in issued.reads:
            writer = storage.writer
            if writer is not None and not writer.before(issued):
                self._refuse(
                    issued,
                    f"{_short(issued.op)} on stream {_stream(issued)} uses what {_short(writer.op)} on stream"
                    f" {_stream(writer)} computes without waiting for it: record an event behind that one on"
                    f" {_stream(writer)} and wait for it on {_stream(issued)} before this line",
                )
            owner = self._held.get(storage.buffer)
            if storage.buffer >= 0 and owner is not storage and owner is not None and owner.writer is not None:
                self._refuse(
                    issued,
                    f"buffer {storage.buffer} is reused too early: {_short(owner.writer.op)} writes it while"
                    f" {_short(issued.op)} still has to read what {_written(storage)} left there",
                )

    def _cache(self, issued: Issued) -> None:
        """Appending to a cache and reading it are ordered within a micro-batch; others use other pages, unless they
        are parts of one prompt."""
        for storage in issued.reads:
            if not is_cache(storage):
                continue
            key = storage, cache_part(issued.function, issued.op)
            writer = self._written.get(key)
            if writer is not None and not writer.before(issued):
                self._refuse(
                    issued,
                    f"{_short(issued.op)} on stream {_stream(issued)} uses the cache without waiting for"
                    f" {_short(writer.op)} on stream {_stream(writer)}",
                )
            # Index keys stand beside the rows of a token, and are added and read apart from them.
            place = storage, cache_layer(issued), "index" in issued.op.name
            if issued.op.name.startswith("cache.append"):
                self._written[key] = issued
                self._added_late(issued, self._read.get(place, []))
            else:
                self._read.setdefault(place, []).append(issued)

    def _added_late(self, issued: Issued, readers: list[Issued]) -> None:
        """What a step adds to a layer's cache is there before its micro-batch, or a later part of the prompt, reads."""
        mine = int(str(issued.op.attrs.get("micro_batch", 0)))
        whole = cache_part(issued.function, issued.op) is None and "prompt_parts" in issued.function.attrs
        for reader in readers:
            part = int(str(reader.op.attrs.get("micro_batch", 0)))
            if part == mine or (whole and part > mine):
                self._refuse(
                    issued,
                    f"{_short(issued.op)} adds rows to the cache behind {_short(reader.op)}, which reads them: put it"
                    " before that one",
                )

    def _results(self, issued: Issued) -> None:
        placed = issued.op.attrs.get("buffers")
        if isinstance(placed, tuple) and len(placed) != len(issued.op.results):
            self._refuse(issued, f"{len(placed)} buffers for {len(issued.op.results)} results")
        for storage in issued.writes:
            if storage.buffer < 0:
                continue
            self._fits(issued, storage)
            owner = self._held.get(storage.buffer)
            if owner is not None:
                self._free(issued, owner)
            self._held[storage.buffer] = storage

    def _free(self, issued: Issued, owner: Storage) -> None:
        assert owner.writer is not None
        if owner.writer is issued:
            self._refuse(issued, f"two results of {_short(issued.op)} are given buffer {owner.buffer}")
        for user, what in [(owner.writer, "write"), *((r, "read") for r in owner.readers)]:
            if not user.before(issued):
                self._refuse(
                    issued,
                    f"buffer {owner.buffer} is reused too early: {_short(issued.op)} on stream {_stream(issued)} writes"
                    f" it while {_short(user.op)} on stream {_stream(user)} may still {what} it; wait for that one,"
                    " or take another buffer",
                )

    def _fits(self, issued: Issued, storage: Storage) -> None:
        if not self._bytes:
            return
        if storage.buffer >= len(self._bytes):
            self._refuse(issued, f"there is no buffer {storage.buffer}, the entry has {len(self._bytes)}")
        t = storage.value.type
        if not isinstance(t, TensorType):
            return
        size = t.nbytes()
        if isinstance(size, Dim) and size.symbols() - set(self._sizes):
            return
        need = bind(size, {k: int(v) for k, v in self._sizes.items()})
        if need > self._bytes[storage.buffer]:
            room = self._bytes[storage.buffer]
            self._refuse(issued, f"%{storage.value.name} takes {need} bytes, buffer {storage.buffer} has {room}")


def _cycle(function: Function, start: int) -> list[Op]:
    """Ops from a wait to the record of its event that itself comes after the wait; empty when there is no such path."""
    ops = function.ops
    goal = next((i for i in range(start, len(ops)) if _same_event(ops[i], ops[start])), None)
    if goal is None:
        return []
    parent: dict[int, int] = {start: start}
    pending = [start]
    while pending:
        i = pending.pop(0)
        if i == goal:
            path = [i]
            while path[-1] != start:
                path.append(parent[path[-1]])
            return [ops[k] for k in reversed(path) if ops[k].name not in CALLS]
        for j in _followers(ops, i):
            if j not in parent:
                parent[j] = i
                pending.append(j)
    return []


def _followers(ops: list[Op], i: int) -> list[int]:
    """Positions of the ops that cannot start before the one at `i` has ended: its stream's next, and waits for it."""
    stream = ops[i].attrs.get("stream")
    found = [next((j for j in range(i + 1, len(ops)) if ops[j].attrs.get("stream") == stream), None)]
    if ops[i].name == "event.record":
        found += [
            j for j, op in enumerate(ops) if op.name == "event.wait" and op.attrs["event"] == ops[i].attrs["event"]
        ]
    return [j for j in found if j is not None]


def _same_event(op: Op, wait: Op) -> bool:
    return op.name == "event.record" and op.attrs["event"] == wait.attrs["event"]


def _short(op: Op) -> str:
    """An op without types and placement, for a message."""
    if op.name.startswith("event."):
        return f"{op.name} {op.attrs['event']} on {op.attrs['stream']}"
    return print_op(Op(op.name, op.operands, {}, op.results), locations=False).rpartition(" : ")[0] or op.name


def _written(storage: Storage) -> str:
    return _short(storage.writer.op) if storage.writer is not None else f"%{storage.value.name}"


def _stream(issued: Issued) -> str:
    return issued.stream or "(none)"


def _numbers(function: Function, key: str) -> list[int]:
    value = function.attrs.get(key, ())
    return [v for v in value if isinstance(v, int)] if isinstance(value, tuple) else []


def _texts(function: Function, key: str) -> list[str]:
    value = function.attrs.get(key, ())
    return [v for v in value if isinstance(v, str) and "=" in v] if isinstance(value, tuple) else []
