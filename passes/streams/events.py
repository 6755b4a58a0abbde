"""Events where a stream uses what another one computes: as few waits as keep every dependency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moec.ir import Function, Module, Op
from moec.ir.issue import EVENTS, Issued, Storage, Tracer, cache_part, is_cache, is_view
from moec.ir.module import Attribute


def add_events(module: Module, entry: Function, origin: Mapping[Op, Op]) -> int:
    """Insert `event.record` and `event.wait` into the functions that `entry` runs; returns the number of events.

    Ops of `origin` are copies: an event belongs to the original, so that one round's wait meets the signal of the
    round before. A wait is left out where the clocks say that it would never have to wait.
    """
    events: dict[Op, int] = {}
    while missing := _missing(module, entry):
        for user, writers in missing.items():
            sources = [origin.get(w.op, w.op) for w in writers]
            for source in sources:
                events.setdefault(source, len(events))
            stream = user.op.attrs["stream"]
            at = user.function.ops.index(user.op)
            waits = [_event("event.wait", events[s], stream) for s in dict.fromkeys(sources)]
            user.function.ops[at:at] = waits
        _record(module, origin, events)
    _drop_unheard(module, entry)
    return len(events)


def _missing(module: Module, entry: Function) -> dict[Issued, list[Issued]]:
    """The first op of each function that lacks waits, with the last writers on other streams that it waits for."""
    found: dict[Function, tuple[Issued, dict[str, Issued]]] = {}
    appended: dict[tuple[Storage, object], Issued] = {}
    for issued in Tracer(module, rounds=3).run(entry):
        if issued.op.name in EVENTS or is_view(issued.op):
            continue
        for writer in _writers(issued, appended):
            if not writer.before(issued):
                user, latest = found.setdefault(issued.function, (issued, {}))
                if user.op is issued.op and writer.number > getattr(latest.get(writer.stream), "number", 0):
                    latest[writer.stream] = writer
        if issued.op.name.startswith("cache.append"):
            for storage in filter(is_cache, issued.reads):
                appended[storage, cache_part(issued.function, issued.op)] = issued
    return {user: list(latest.values()) for user, latest in found.values()}


def _writers(issued: Issued, appended: Mapping[tuple[Storage, object], Issued]) -> Iterator[Issued]:
    for storage in issued.reads:
        if storage.writer is not None:
            yield storage.writer
        last = appended.get((storage, cache_part(issued.function, issued.op)))
        if last is not None:
            yield last


def _record(module: Module, origin: Mapping[Op, Op], events: Mapping[Op, int]) -> None:
    """Record every event right behind the op that it belongs to, in all functions that have the op."""
    for function in module.functions.values():
        ops: list[Op] = []
        for op, behind in zip(function.ops, [*function.ops[1:], None], strict=True):
            ops.append(op)
            event = events.get(origin.get(op, op))
            if event is not None and not (behind and behind.name == "event.record" and behind.attrs["event"] == event):
                ops.append(_event("event.record", event, op.attrs["stream"]))
        function.ops = ops


def _drop_unheard(module: Module, entry: Function) -> None:
    """Take away the signals that no wait meets, such as those of the last round."""
    heard: set[Op] = set()
    visited: set[Function] = set()
    last: dict[object, Op] = {}
    for issued in Tracer(module, rounds=3).run(entry):
        visited.add(issued.function)
        if issued.op.name == "event.record":
            last[issued.op.attrs["event"]] = issued.op
        elif issued.op.name == "event.wait":
            heard.add(last[issued.op.attrs["event"]])
    for function in visited:
        function.ops = [op for op in function.ops if op.name != "event.record" or op in heard]


def _event(name: str, event: int, stream: Attribute) -> Op:
    return Op(name, [], {"event": event, "stream": stream}, [])
