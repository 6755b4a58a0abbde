"""The collectives of a sharded program over torch.distributed, on tensors that lie in the program's own buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moec.ir.replicas import Replicas
from moec.runtime.distributed import plain
from moec.runtime.distributed.world import Axis, Exchange, Pending, World
from moec.runtime.steps import Collective, View

Array = NDArray[Any]


class Buffers(Protocol):
    """What a collective reads and writes: tensors of one call, and its sizes known at run time."""

    def array(self, view: View) -> Array:
        """The rows of a view that are in use now."""

    def resize(self, symbol: str, value: int) -> None:
        """Set a size that later views and segments use."""


class Collectives:
    """Runs collectives for one rank. `replicas(layer, attrs)` gives the placement of a layer's experts."""

    def __init__(self, world: World, replicas: Callable[[int, dict[str, Any]], Replicas]) -> None:
        self.world = world
        self._replicas = replicas
        self._sent: dict[tuple[str, int], _Dispatched] = {}

    def another(self) -> Collectives:
        """The same ranks and placement for a call that runs beside this one's: dispatches are kept apart."""
        return Collectives(self.world, self._replicas)

    def run(self, op: Collective, layer: int, buffers: Buffers) -> None:
        """Run one collective; raises RuntimeError when a peer is gone or late."""
        axis = self.world.axes[op.axis]
        if op.name in plain.PLAIN:
            inputs, outputs = ([torch.from_numpy(buffers.array(v)) for v in views] for views in (op.inputs, op.outputs))
            plain.run(op.name, axis, op.attrs, inputs, outputs)
        else:
            getattr(self, f"_{op.name}")(op, axis, layer, buffers)

    def begin(self, op: Collective, b: Buffers) -> tuple[Exchange | None, Array | None]:
        """Start a send or a receive; returns the exchange (None with no rows) and the array that a receive fills."""
        axis = self.world.axes[op.axis]
        if op.name == "send":
            x = torch.from_numpy(b.array(op.inputs[0])).clone()
            axis.count(x.numel() * x.element_size())
            return (axis.send(x, op.attrs["to"]) if x.numel() else None), None
        got = torch.from_numpy(np.empty_like(b.array(op.outputs[0]), order="C"))
        return (axis.recv(got, op.attrs["source"]) if got.numel() else None), got.numpy()

    def moves(self, op: Collective, layer: int, b: Buffers) -> Iterator[Pending]:
        """A dispatch or combine in steps: what is yielded has been started, and has to have ended to go on.

        Forwarding inside nodes runs at once.
        """
        axis = self.world.axes[op.axis]
        if _forwards(op, axis):
            self.run(op, layer, b)
            return
        if op.name == "combine":
            rows, _, weights = (b.array(v) for v in op.inputs)
            handle = op.inputs[1]
            done = self._sent.pop((handle.buffer, handle.offset))
            assert isinstance(done, _Direct)
            pairs = done.pairs
            work, home = axis.start_rows(pairs.outgoing(rows), pairs.got, pairs.sent)
            yield work
            b.array(op.outputs[0])[...] = done.summed(pairs.in_order(home), weights)
            return
        x, ids, _ = (b.array(v) for v in op.inputs)
        slots = self._replicas(layer, op.attrs).choose(ids, axis.index)
        k = slots.shape[1]
        local = op.attrs["slots"] // axis.size
        order, counts = _Pairs.sorted(axis, local, slots.reshape(-1))
        counting, theirs = axis.start_counts(counts)
        yield counting
        sent, got = counts.sum(1).tolist(), theirs.sum(1).tolist()
        moving, arrived = axis.start_rows(x[order // k], sent, got)
        yield moving
        pairs = _Pairs.arrived(axis, local, order, sent, got, arrived, theirs)
        self._deliver(op, b, _Direct(pairs))

    def _dispatch(self, op: Collective, axis: Axis, layer: int, b: Buffers) -> None:
        x, ids, weights = (b.array(v) for v in op.inputs)
        slots = self._replicas(layer, op.attrs).choose(ids, axis.index)
        way = _Forwarded if _forwards(op, axis) else _Direct.send
        self._deliver(op, b, way(axis, op.attrs, x, slots, weights))

    def _deliver(self, op: Collective, b: Buffers, done: _Dispatched) -> None:
        rows, offsets, counts = done.arrived()
        b.resize(op.attrs["rows"], len(rows))
        b.array(op.outputs[0])[...] = rows
        b.array(op.outputs[1])[...] = offsets
        b.array(op.outputs[2])[...] = counts
        handle = op.outputs[2]
        self._sent[handle.buffer, handle.offset] = done

    def _combine(self, op: Collective, axis: Axis, layer: int, b: Buffers) -> None:
        rows, _, weights = (b.array(v) for v in op.inputs)
        handle = op.inputs[1]
        b.array(op.outputs[0])[...] = self._sent.pop((handle.buffer, handle.offset)).back(rows, weights)


def _forwards(op: Collective, axis: Axis) -> bool:
    return bool(op.attrs["via"] == "node" and 1 < op.attrs["per_node"] < axis.size)


@dataclass
class _Pairs:
    """Rows sent to the ranks that hold slots, one for each (row, slot) pair, and how results find back."""

    axis: Axis
    order: Array
    by_slot: Array
    sent: list[int]
    got: list[int]
    rows: Array
    offsets: Array

    @staticmethod
    def send(axis: Axis, local: int, x: Array, row: Array, slot: Array) -> _Pairs:
        """Send `x[row[p]]` to the rank of `slot[p]`; what arrives is sorted by the slots of this rank."""
        order, counts = _Pairs.sorted(axis, local, slot)
        theirs = axis.exchange_counts(counts)
        sent, got = counts.sum(1).tolist(), theirs.sum(1).tolist()
        arrived = axis.exchange_rows(x[row[order]], sent, got)
        return _Pairs.arrived(axis, local, order, sent, got, arrived, theirs)

    @staticmethod
    def sorted(axis: Axis, local: int, slot: Array) -> tuple[Array, Array]:
        """The pairs in the order in which they travel, and how many go to each slot of each rank."""
        counts = np.bincount(slot, minlength=local * axis.size).reshape(axis.size, local)
        return np.argsort(slot, kind="stable"), counts

    @staticmethod
    def arrived(
        axis: Axis, local: int, order: Array, sent: list[int], got: list[int], arrived: Array, theirs: Array
    ) -> _Pairs:
        """The pairs once their rows are there."""
        slots = np.repeat(np.tile(np.arange(local), axis.size), theirs.reshape(-1))
        by_slot = np.argsort(slots, kind="stable")
        offsets = np.concatenate(([0], np.cumsum(theirs.sum(0))))
        return _Pairs(axis, order, by_slot, sent, got, arrived[by_slot], offsets)

    def back(self, results: Array) -> Array:
        """The result of every pair, in the order in which the pairs were given."""
        return self.in_order(self.axis.exchange_rows(self.outgoing(results), self.got, self.sent))

    def outgoing(self, results: Array) -> Array:
        """Results in the order in which their rows arrived."""
        arrived = np.empty_like(results)
        arrived[self.by_slot] = results
        return arrived

    def in_order(self, home: Array) -> Array:
        """Results that came home in the order in which the pairs were given."""
        out = np.empty_like(home)
        out[self.order] = home
        return out


class _Dispatched(Protocol):
    """A dispatch whose results are still out."""

    def arrived(self) -> tuple[Array, Array, list[int]]:
        """Rows that came, offsets of the slots in them, how many came from each rank."""

    def back(self, rows: Array, weights: Array) -> Array:
        """Send results back; returns each token's weighted sum."""


@dataclass
class _Direct:
    """Every pair travels to the rank of its slot."""

    pairs: _Pairs

    @staticmethod
    def send(axis: Axis, attrs: dict[str, Any], x: Array, slots: Array, weights: Array) -> _Direct:
        """Send every token to each of its slots."""
        tokens, k = slots.shape
        local = attrs["slots"] // axis.size
        return _Direct(_Pairs.send(axis, local, x, np.arange(tokens * k) // k, slots.reshape(-1)))

    def arrived(self) -> tuple[Array, Array, list[int]]:
        return self.pairs.rows, self.pairs.offsets, self.pairs.got

    def back(self, rows: Array, weights: Array) -> Array:
        return self.summed(self.pairs.back(rows), weights)

    def summed(self, results: Array, weights: Array) -> Array:
        """Each token's weighted sum of its pairs' results."""
        return (weights[:, None, :] @ results.reshape(*weights.shape, results.shape[1]))[:, 0]


class _Forwarded:
    """A token travels once to every node that it needs, to the rank with the sender's place there, which forwards it.

    On the way back that rank sums what its node computed for the token (arXiv 2412.19437, sec. 3.2.2).
    """

    def __init__(self, axis: Axis, attrs: dict[str, Any], x: Array, slots: Array, weights: Array) -> None:
        self.axis = axis
        local, per_node = attrs["slots"] // axis.size, attrs["per_node"]
        tokens, k = slots.shape
        place, nodes = axis.index % per_node, axis.size // per_node
        node_of = slots // (local * per_node)
        reached = np.zeros((tokens, nodes), dtype=bool)
        np.put_along_axis(reached, node_of, True, axis=1)
        _, self.token = np.nonzero(reached.T)
        self.tokens = tokens
        counts = np.zeros((axis.size, 1), dtype=np.int64)
        counts[place::per_node, 0] = reached.sum(0)
        theirs = axis.exchange_counts(counts)
        self.sent, self.got = counts[:, 0].tolist(), theirs[:, 0].tolist()
        # Slots are small integers, exact in FP32: they and the weights travel with the row.
        payload = np.concatenate((x, slots.astype(np.float32), weights), axis=1)[self.token]
        came = axis.exchange_rows(payload, self.sent, self.got)
        x, slots = came[:, : x.shape[1]], came[:, x.shape[1] : -k].astype(np.int64)
        self.weights = came[:, -k:]
        self.row, self.choice = np.nonzero(slots // (local * per_node) == axis.index // per_node)
        self.pairs = _Pairs.send(axis, local, x, self.row, slots[self.row, self.choice])

    def arrived(self) -> tuple[Array, Array, list[int]]:
        return self.pairs.rows, self.pairs.offsets, self.pairs.got

    def back(self, rows: Array, weights: Array) -> Array:
        results = self.pairs.back(rows) * self.weights[self.row, self.choice][:, None]
        sums = np.zeros((len(self.weights), rows.shape[1]), dtype=rows.dtype)
        np.add.at(sums, self.row, results)
        home = self.axis.exchange_rows(sums, self.got, self.sent)
        out = np.zeros((self.tokens, rows.shape[1]), dtype=rows.dtype)
        np.add.at(out, self.token, home)
        return out
