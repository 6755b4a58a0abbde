"""The processes that torchrun started, as ranks of an artifact's mesh."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from moec.ir.mesh import AXES, Mesh
from moec.runtime.distributed.errors import NoBackend, RanksMissing, WrongRankCount

if TYPE_CHECKING:
    from moec.runtime.distributed.card import Card


@dataclass
class Axis:
    """The ranks along one axis of the mesh, as this rank sees them. `sent` counts bytes to each of them.

    With a `card` rows are under way as long as it takes to send them.
    """

    index: int
    ranks: tuple[int, ...]
    group: Any
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

    def exchange_counts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row i goes to rank i; returns the rows that the others have for this one."""
        work, got = self.start_counts(counts)
        work.wait()
        return got

    def start_counts(self, counts: NDArray[np.int64]) -> tuple[dist.Work, NDArray[np.int64]]:
        """Start `exchange_counts`; the result is there once the work has been waited for."""
        sent = torch.from_numpy(np.ascontiguousarray(counts, dtype=np.int64))
        got = torch.empty_like(sent)
        return dist.all_to_all_single(got, sent, group=self.group, async_op=True), got.numpy()

    def exchange_rows(self, x: NDArray[Any], sent: Sequence[int], got: Sequence[int]) -> NDArray[Any]:
        """Consecutive rows of `x`, `sent[i]` of them to rank i; returns `got[i]` rows from each in turn."""
        work, out = self.start_rows(x, sent, got)
        work.wait()
        return out

    def start_rows(self, x: NDArray[Any], sent: Sequence[int], got: Sequence[int]) -> tuple[Any, NDArray[Any]]:
        """Start `exchange_rows`; the result is there once the work, which keeps `x`, has been waited for."""
        rows = torch.from_numpy(np.ascontiguousarray(x))
        out = torch.empty((sum(got), *x.shape[1:]), dtype=rows.dtype)
        return self.move_rows(out, rows, sent, got), out.numpy()

    def move_rows(self, out: torch.Tensor, x: torch.Tensor, sent: Sequence[int], got: Sequence[int]) -> Any:
        """Start to send consecutive rows of `x`, `sent[i]` of them to rank i; `out` takes `got[i]` rows from each."""
        work: dist.Work = dist.all_to_all_single(out, x, list(got), list(sent), group=self.group, async_op=True)
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
            self.axes[axis] = Axis(mesh.index(self.rank, axis), mine, made[mine])

    def agree(self, value: int) -> int:
        """The greatest value of all ranks."""
        t = torch.tensor([value])
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return int(t)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in order, plain data."""
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

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


def join(timeout: float, backends: str = "gloo") -> tuple[World, Any]:
    """Meet the other processes; returns the world and the store that they share. Raises RanksMissing.

    A rank that waits longer than twice the `timeout` in a collective gives up by itself, should nobody find the cause.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
        store.set_timeout(timedelta(seconds=timeout))
        limit = timedelta(seconds=2 * timeout + 5)
        dist.init_process_group(
            backends, store=distributed_c10d.PrefixStore("moec", store), rank=rank, world_size=size, timeout=limit
        )
    except (RuntimeError, ValueError) as error:
        raise RanksMissing(size=size, seconds=timeout, why=str(error).strip().partition("\n")[0]) from None
    return World(rank, size), store
