"""The processes that torchrun started, as ranks of an artifact's mesh."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from moec.ir.mesh import AXES, Mesh
from moec.runtime.distributed import message
from moec.runtime.distributed.errors import CannotJoin, NoBackend, RanksMissing, WrongRankCount
from moec.runtime.distributed.progress import Progress, Waiting

if TYPE_CHECKING:
    from moec.runtime.distributed.card import Card


class Pending(Protocol):
    """Something under way that can be waited for."""

    def wait(self) -> None:
        """Return when it is over."""


@dataclass(frozen=True)
class Exchange:
    """An exchange that this rank has given its part to: the `number`-th along an axis, with `ranks`."""

    work: dist.Work
    progress: Progress
    axis: str
    number: int
    ranks: tuple[int, ...]

    def wait(self) -> None:
        """Return when the others have given theirs (on a GPU: once the stream waits for it).

        Raises RuntimeError when one is gone.
        """
        with self.progress.wait(Waiting(self.axis, self.number, self.ranks)):
            self.work.wait()


@dataclass
class Axis:
    """The ranks along one axis of the mesh, as this rank sees them. `sent` counts bytes to each of them.

    With a `card` rows are under way as long as it takes to send them.
    """

    name: str
    index: int
    ranks: tuple[int, ...]
    group: Any
    progress: Progress
    sent: NDArray[np.int64] = field(init=False)
    card: Card | None = None

    def __post_init__(self) -> None:
        self.sent = np.zeros(len(self.ranks), dtype=np.int64)

    @property
    def size(self) -> int:
        """Ranks along the axis."""
        return len(self.ranks)

    def count(self, nbytes: int) -> None:
        """Add to the bytes sent, to the next rank of a ring."""
        self.sent[(self.index + 1) % self.size] += nbytes

    def start(self, operation: Callable[..., dist.Work], *args: Any, **options: Any) -> Exchange:
        """Give this rank's part to a collective of torch.distributed along the axis."""
        work = operation(*args, group=self.group, async_op=True, **options)
        return Exchange(work, self.progress, self.name, self.progress.start(self.name), self.ranks)

    def run(self, operation: Callable[..., dist.Work], *args: Any, **options: Any) -> None:
        """A collective of torch.distributed along the axis, from beginning to end."""
        self.start(operation, *args, **options).wait()

    def send(self, x: torch.Tensor, to: int) -> Exchange:
        """Start to send a tensor, which the work keeps, to the rank at `to`."""
        return self._pair(dist.isend(x, self.ranks[to]), self.index, to)

    def recv(self, x: torch.Tensor, source: int) -> Exchange:
        """Start to fill a tensor with what the rank at `source` sends."""
        return self._pair(dist.irecv(x, self.ranks[source]), source, self.index)

    def _pair(self, work: dist.Work | None, source: int, to: int) -> Exchange:
        assert work is not None
        key = f"{self.name} {self.ranks[source]}>{self.ranks[to]}"
        peer = self.ranks[source if to == self.index else to]
        return Exchange(work, self.progress, key, self.progress.start(key), (peer,))

    def exchange_counts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row i goes to rank i; returns the rows that the others have for this one."""
        work, got = self.start_counts(counts)
        work.wait()
        return got

    def start_counts(self, counts: NDArray[np.int64]) -> tuple[Exchange, NDArray[np.int64]]:
        """Start `exchange_counts`; the result is there once the work has been waited for."""
        sent = torch.from_numpy(np.ascontiguousarray(counts, dtype=np.int64))
        got = torch.empty_like(sent)
        return self.start(dist.all_to_all_single, got, sent), got.numpy()

    def exchange_rows(self, x: NDArray[Any], sent: Sequence[int], got: Sequence[int]) -> NDArray[Any]:
        """Consecutive rows of `x`, `sent[i]` of them to rank i; returns `got[i]` rows from each in turn."""
        work, out = self.start_rows(x, sent, got)
        work.wait()
        return out

    def start_rows(self, x: NDArray[Any], sent: Sequence[int], got: Sequence[int]) -> tuple[Pending, NDArray[Any]]:
        """Start `exchange_rows`; the result is there once the work, which keeps `x`, has been waited for."""
        rows = torch.from_numpy(np.ascontiguousarray(x))
        out = torch.empty((sum(got), *x.shape[1:]), dtype=rows.dtype)
        return self.move_rows(out, rows, sent, got), out.numpy()

    def move_rows(self, out: torch.Tensor, x: torch.Tensor, sent: Sequence[int], got: Sequence[int]) -> Pending:
        """Start to send consecutive rows of `x`, `sent[i]` of them to rank i; `out` takes `got[i]` rows from each."""
        work = self.start(dist.all_to_all_single, out, x, list(got), list(sent))
        width = x.element_size() * int(np.prod(x.shape[1:], dtype=np.int64))
        leaving = np.asarray(sent, dtype=np.int64) * width * (np.arange(self.size) != self.index)
        self.sent += leaving
        return self.card.send(work, int(leaving.sum())) if self.card else work


@dataclass
class World:
    """This process among all: its rank, the mesh, and the groups along its axes."""

    rank: int
    size: int
    mesh: Mesh = field(default_factory=Mesh)
    axes: dict[str, Axis] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self._all = Axis("all", self.rank, tuple(range(self.size)), None, self.progress)

    def lay_out(self, mesh: Mesh) -> None:
        """Make the groups of a mesh; every rank calls it. Raises WrongRankCount."""
        if mesh.ranks != self.size:
            raise WrongRankCount(needed=mesh.ranks, started=self.size)
        self.mesh = mesh
        made: dict[tuple[int, ...], Any] = {}
        for axis in AXES:
            for ranks in dict.fromkeys(mesh.group(r, axis) for r in range(self.size)):
                # Every rank takes part in making every group, in this order.
                if ranks not in made:
                    made[ranks] = dist.new_group(list(ranks)) if len(ranks) < self.size else dist.group.WORLD
            mine = mesh.group(self.rank, axis)
            self.axes[axis] = Axis(axis, mesh.index(self.rank, axis), mine, made[mine], self.progress)

    def agree(self, value: int) -> int:
        """The greatest value of all ranks."""
        t = torch.tensor([value])
        self._all.run(dist.all_reduce, t, op=dist.ReduceOp.MAX)
        return int(t)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in order: what `message.pack` takes; tuples become lists."""
        mine = np.frombuffer(message.pack(value), dtype=np.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._all.run(dist.all_gather, sizes, torch.tensor([len(mine)]))
        longest = max(map(int, sizes))
        filled = torch.zeros(longest, dtype=torch.uint8)
        filled[: len(mine)] = torch.from_numpy(mine.copy())
        parts = [torch.empty_like(filled) for _ in range(self.size)]
        self._all.run(dist.all_gather, parts, filled)
        return [message.unpack(p.numpy()[: int(n)].tobytes()) for p, n in zip(parts, sizes, strict=True)]

    def catching_up(self) -> AbstractContextManager[None]:
        """Inside, this rank waits for the others of every axis to give their part to all that it has given its own."""
        axes = self.axes.values()
        return self.progress.wait(*(Waiting(a.name, self.progress.started[a.name], a.ranks) for a in axes))

    def leave(self) -> None:
        """Close the connections; every rank calls it."""
        dist.destroy_process_group()

    def traffic(self) -> Mapping[str, Any]:
        """Bytes sent to each rank along every axis so far."""
        return {name: axis.sent.tolist() for name, axis in self.axes.items() if axis.size > 1}


def backend(kind: str, path: str) -> str:
    """torch.distributed's backends for the tensors of an artifact's kind of device; raises NoBackend.

    What ranks agree on stays on the host in either case: gloo.
    """
    if kind == "cpu":
        return "gloo"
    if not dist.is_nccl_available():
        raise NoBackend(path=path, kind=kind, why="this torch was built without it")
    if not torch.cuda.is_available():
        raise NoBackend(path=path, kind=kind, why="no GPU is visible to this process")
    return "cpu:gloo,cuda:nccl"


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT end the process: Python's handlers would run when the wait for other ranks is over.

    torchrun terminates all ranks when one ends early.
    """
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def join(timeout: float, backends: str = "gloo") -> tuple[World, Any]:
    """Meet the other processes; returns the world and the store that they share. Raises RanksMissing or CannotJoin.

    A rank that waits longer than twice the `timeout` in a collective gives up by itself, should nobody find the cause.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    began = time.monotonic()
    try:
        with _ended_at_once():
            store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
            store.set_timeout(timedelta(seconds=timeout))
            shared = distributed_c10d.PrefixStore("moec", store)
            limit = timedelta(seconds=2 * timeout + 5)
            dist.init_process_group(backends, store=shared, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        # An interface or an address that this rank does not have is found at once.
        if time.monotonic() - began < timeout / 2:
            raise CannotJoin(rank=rank, why=why) from None
        raise RanksMissing(size=size, seconds=timeout, why=why) from None
    return World(rank, size), store
