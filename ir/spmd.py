"""All ranks of a small mesh evaluated at once, one thread each, in lock-step at their collectives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from moec.ir.mesh import AXES, Mesh

R = TypeVar("R")
PATIENCE = 120.0
"""Seconds that a rank waits for its peers: longer than any evaluation, so that a mismatch ends instead of hanging."""


class Group(Protocol):
    """The ranks along one axis, as one of them sees it."""

    index: int
    size: int

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks in order; every rank of the group calls it."""

    def send(self, to: int, value: Any) -> None:
        """Hand a value to the rank at place `to`."""

    def receive(self, source: int) -> Any:
        """The next value from the rank at place `source`."""


class Peers(Protocol):
    """The other ranks of a mesh, by axis."""

    def group(self, axis: str) -> Group:
        """The ranks along an axis."""


def run_ranks(mesh: Mesh, body: Callable[[int, Peers], R]) -> list[R]:
    """`body(rank, peers)` for every rank, each in a thread of its own; results in the order of ranks.

    Raises the first error of any rank; the others are released from their waits.
    """
    rooms = {(axis, mesh.group(r, axis)): _Room(mesh.size(axis)) for r in range(mesh.ranks) for axis in AXES}
    results: list[Any] = [None] * mesh.ranks
    errors: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        peers = {axis: _Member(rooms[axis, mesh.group(rank, axis)], mesh.index(rank, axis)) for axis in AXES}
        try:
            results[rank] = body(rank, _Peers(peers))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append((rank, error))
            for room in rooms.values():
                room.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(mesh.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0][1]
    return results


class _Room:
    """Where the ranks of one group meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.aborted = False
        self.post: dict[tuple[int, int], SimpleQueue[Any]] = {
            (a, b): SimpleQueue() for a in range(size) for b in range(size)
        }

    def abort(self) -> None:
        """Release everyone who waits."""
        self.aborted = True
        self.barrier.abort()
        for queue in self.post.values():
            queue.put(_ABORTED)


_ABORTED = object()


class _Member:
    def __init__(self, room: _Room, index: int) -> None:
        self.index = index
        self.size = room.size
        self._room = room

    def exchange(self, value: Any) -> list[Any]:
        self._room.values[self.index] = value
        self._meet()
        out = list(self._room.values)
        # Nobody may put the next value down before all have taken these.
        self._meet()
        return out

    def _meet(self) -> None:
        try:
            self._room.barrier.wait()
        except threading.BrokenBarrierError:
            if self._room.aborted:
                raise
            raise ValueError(f"not all {self.size} ranks of the axis came to an exchange") from None

    def send(self, to: int, value: Any) -> None:
        self._room.post[self.index, to].put(value)

    def receive(self, source: int) -> Any:
        try:
            value = self._room.post[source, self.index].get(timeout=PATIENCE)
        except Empty:
            raise ValueError(f"nothing came from place {source} of the axis") from None
        if value is _ABORTED:
            raise threading.BrokenBarrierError
        return value


class _Peers:
    def __init__(self, members: dict[str, _Member]) -> None:
        self._members = members

    def group(self, axis: str) -> Group:
        return self._members[axis]
