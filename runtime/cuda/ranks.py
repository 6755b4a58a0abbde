"""The engine of one of several ranks with a GPU each: the same phases, between whose kernels ranks exchange rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import replace
from typing import Any

import numpy as np

from moec.ir.mesh import part
from moec.ir.replicas import Replicas, default_slots
from moec.runtime.artifact import Artifact
from moec.runtime.cache import Sequence
from moec.runtime.cuda.engine import GpuEngine, Ran, buckets
from moec.runtime.cuda.executor import Executor
from moec.runtime.cuda.inputs import Inputs
from moec.runtime.cuda.kernel import Kernel
from moec.runtime.cuda.pieces import PiecewiseExecutor
from moec.runtime.cuda.program import Exchange, GpuEntry, GpuPlan
from moec.runtime.distributed.device import DeviceCollectives, DeviceTensors
from moec.runtime.distributed.meeting import DECODE, PREFILL, Meeting
from moec.runtime.distributed.monitor import Monitor
from moec.runtime.distributed.overlapped import shares
from moec.runtime.distributed.world import World
from moec.runtime.sampling import Draw


class RankEngine(Meeting, GpuEngine):
    """An engine whose calls every rank of the mesh takes part in, over NCCL.

    `library` stands in for the driver library in tests; the ranks then exchange host memory over gloo.
    """

    def __init__(self, artifact: Artifact, world: World, monitor: Monitor, library: Any = None) -> None:
        self.world, self.monitor = world, monitor
        self._host = library is not None
        ordinal = int(os.environ.get("LOCAL_RANK", "0"))
        if not self._host:
            import torch

            # NCCL takes the device that torch has chosen; the context is the one that the driver gives.
            torch.cuda.set_device(ordinal)
        super().__init__(artifact, 0 if self._host else ordinal, library)
        decode = self.plan.entries.get("decode")
        self._part_buckets = buckets(decode.most(self.batch)) if decode else []
        self._collectives = DeviceCollectives(world, DeviceTensors(self.memory, self._host))

    def _executor(self, kernels: Mapping[str, Kernel], entry: GpuEntry) -> Executor:
        return PiecewiseExecutor(self.driver, kernels, self.memory, entry, self)

    def _tables(self, plan: GpuPlan) -> Any:
        experts, slots = plan.slots
        if not slots:
            return None
        rows, shares = plan.mesh.placement or (tuple(default_slots(experts, slots)),), plan.mesh.shares
        tables = [Replicas(row, experts, shares[i] if shares else None).table() for i, row in enumerate(rows)]
        return np.concatenate(tables)

    def begin(self, phase: str) -> None:
        """A call of a phase begins."""
        self.monitor.begin(phase)

    def start(self, op: Exchange, layer: int, sizes: dict[str, int], stream: int) -> Iterator[None]:
        """As `DeviceCollectives.start`, on a stream of this engine, watched."""
        moves = self._collectives.start(op, layer, sizes)
        more = True
        while more:
            with (
                self.monitor.communication(f"{op.name}, {op.where}", None if layer < 0 else layer),
                self._collectives.tensors.stream(stream),
            ):
                more = next(moves, self) is not self
            if more:
                yield

    def _ready(self, phase: str) -> None:
        self.meet(PREFILL if phase == "prefill" else DECODE)

    def _call_decode(self, sequences: List[Sequence], tokens: List[List[int]], draws: List[Draw]) -> Ran:
        entry = self.plan.entries["decode"]
        if entry.parts == 1:
            return super()._call_decode(sequences, tokens, draws)
        mine = shares([s.length + 1 for s in sequences], entry.parts)
        size = next(b for b in self._part_buckets if b >= max(map(len, mine)))
        given = [
            self._inputs(
                [sequences[i] for i in few], [sequences[i].length for i in few], [tokens[i] for i in few], False,
                lambda count: size,
            )
            for few in mine
        ]  # fmt: skip
        order = tuple(i for few in mine for i in few)
        ran = self._run("decode", given, graph=True, draws=[draws[i] for i in order] if draws else ())
        return replace(ran, order=order)

    def idle(self, phase: int) -> None:
        """Take part in a call with a token that is nobody's: it is sent nowhere and writes where nobody reads."""
        name = "prefill" if phase == PREFILL else "decode"
        nobody = self._inputs([], [], [], False, lambda count: 1)
        self._run(name, [nobody] * self.plan.entries[name].parts, graph=name == "decode")

    def _symbols(self, given: Inputs, longest: int, k: str) -> dict[str, int]:
        mesh, rank = self.world.mesh, self.world.rank
        first, stop = part(given.tokens, mesh.tp, mesh.index(rank, "tp"))
        live = self.memory.input(f"live_{k}" if k else "live", 2)
        live[:] = given.count, min(max(given.count - first, 0), stop - first)
        sizes = super()._symbols(given, longest, k)
        return {**sizes, f"U{k}": stop - first, f"D{k}": 0, "RANK": mesh.index(rank, "ep")}

    def _end(self, stream: int) -> None:
        with self.monitor.communication("the end of a step", layer=None), self.world.catching_up():
            super()._end(stream)
