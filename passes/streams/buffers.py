"""A buffer for every result of a scheduled entry, shared where the clocks prove that one use ends before the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from moec.ir import Dim, Function, Module, Op, TensorType
from moec.ir.dims import bind
from moec.ir.issue import EVENTS, Issued, Storage, Tracer, is_view

ALIGNED = 256
"""Buffers are multiples of so many bytes, as allocators of GPUs align them."""

Slot = tuple[Op, int]
"""A result of an op of the layer function; its copies in prologue, kernel and epilogue share the buffer."""


@dataclass
class _Group:
    slot: Slot
    nbytes: int
    uses: list[Storage] = field(default_factory=list)


@dataclass
class _Buffer:
    nbytes: int
    groups: list[_Group] = field(default_factory=list)


def assign_buffers(module: Module, entry: Function, origin: Mapping[Op, Op], sizes: Mapping[str, int]) -> int:
    """Give every op with a stream its `buffers` and the entry `buffer_bytes` and `sizes`; returns the bytes in all.

    First fit over the order of issue, largest first among equals; `sizes` are the greatest values of the symbols. A
    result that outlives its own next round gets no buffer (-1).
    """
    groups = _groups(module, entry, origin, sizes)
    buffers: list[_Buffer] = []
    chosen: dict[Slot, int] = {}
    for group in sorted(groups, key=lambda g: -g.nbytes):
        if not _apart(group, group):
            continue
        fitting = (i for i, b in enumerate(buffers) if all(_apart(group, other) for other in b.groups))
        number = next(fitting, len(buffers))
        if number == len(buffers):
            buffers.append(_Buffer(group.nbytes))
        buffers[number].groups.append(group)
        chosen[group.slot] = number
    for op, source in origin.items():
        if op.results and not is_view(op) and "stream" in op.attrs:
            op.attrs["buffers"] = tuple(chosen.get((source, i), -1) for i in range(len(op.results)))
    entry.attrs["buffer_bytes"] = tuple(b.nbytes for b in buffers)
    entry.attrs["sizes"] = tuple(f"{name}={value}" for name, value in sorted(sizes.items()))
    return sum(b.nbytes for b in buffers)


def _groups(module: Module, entry: Function, origin: Mapping[Op, Op], sizes: Mapping[str, int]) -> list[_Group]:
    found: dict[Slot, _Group] = {}
    for issued in Tracer(module, rounds=3).run(entry):
        if issued.op.name in EVENTS or issued.op not in origin:
            continue
        for i, storage in enumerate(issued.writes):
            slot = origin[issued.op], i
            if slot not in found:
                found[slot] = _Group(slot, _bytes(storage, sizes))
            found[slot].uses.append(storage)
    return list(found.values())


def _bytes(storage: Storage, sizes: Mapping[str, int]) -> int:
    t = storage.value.type
    assert isinstance(t, TensorType)
    size = t.nbytes()
    missing = size.symbols() - set(sizes) if isinstance(size, Dim) else frozenset()
    known = {**sizes, **dict.fromkeys(missing, max(sizes.values(), default=1))}
    return -(-bind(size, known) // ALIGNED) * ALIGNED


def _apart(a: _Group, b: _Group) -> bool:
    """Whether of any two uses, one of each group, one has ended for certain before the other begins."""
    for one in a.uses:
        for other in b.uses:
            if one is not other and not (_ended(one, other) or _ended(other, one)):
                return False
    return True


def _ended(one: Storage, other: Storage) -> bool:
    writer = other.writer
    return writer is not None and all(user.before(writer) for user in _users(one))


def _users(storage: Storage) -> Iterator[Issued]:
    if storage.writer is not None:
        yield storage.writer
    yield from storage.readers
