"""The executor of one rank: native segments and collectives in turn, every rank in the same phase at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.ir.mesh import part
from moec.runtime.artifact import Artifact
from moec.runtime.cache import Sequence
from moec.runtime.distributed.collectives import Collectives
from moec.runtime.distributed.meeting import DECODE, PREFILL, Meeting
from moec.runtime.distributed.monitor import Monitor
from moec.runtime.distributed.overlapped import Overlapped, shares
from moec.runtime.distributed.stages import Late, Started, may_wait
from moec.runtime.distributed.world import World
from moec.runtime.engine import Call, Engine, Ids, Logits
from moec.runtime.memory import Memory
from moec.runtime.plan import Argument, Entry, Plan, Routing
from moec.runtime.steps import Collective, Loop, Segment, Step, View


class DistributedEngine(Meeting, Engine):
    """An engine whose calls every rank of the mesh takes part in."""

    def __init__(
        self, artifact: Artifact, world: World, collectives: Collectives, monitor: Monitor, threads: int | None
    ) -> None:
        self.world = world
        self.collectives = collectives
        self.monitor = monitor
        self.overlapped: Overlapped | None = None
        """Set: decode runs in micro-batches that hide each other's exchanges."""
        self.micro_batches = 1
        """Parts of a decode step that are under way at the same time in a pipeline."""
        self.pieces = 2 * world.mesh.pp if world.mesh.pp > 1 else 1
        super().__init__(artifact, threads)
        self._artifact = artifact
        if isinstance(artifact.plan, Plan) and artifact.plan.decode.turns:
            self.overlapped = Overlapped(self, artifact.plan.decode.parts, turns=artifact.plan.decode.turns)

    def record_loads(self, path: str) -> None:
        """As `Engine.record_loads`, on all ranks; those of a stage without experts count nothing."""
        if self.world.agree(int(self._decode.routing is not None)) == 0 or self._decode.routing is not None:
            super().record_loads(path)

    def _routed_rows(self, routing: Routing, tokens: int) -> int:
        """A tensor-parallel group's ranks route all tokens alike, or each its part."""
        index = self.world.mesh.index(self.world.rank, "tp")
        if routing.rows == "T":
            return tokens if index == 0 else 0
        first, stop = part(tokens, self.world.mesh.tp, index)
        return stop - first

    def _entry(self, entry: Entry, sequences: int) -> Call:
        if not entry.steps:  # nothing between ranks: every one runs the whole model
            return super()._entry(entry, sequences)
        return SteppedCall(self, entry, sequences, self.collectives, self.fixed)

    def another(self, sequences: int) -> SteppedCall:
        """One more decode call, with a workspace and dispatches of its own."""
        assert isinstance(self._artifact.plan, Plan)
        entry = self._artifact.plan.decode
        memory = Memory([a for a in entry.args if a.kind == "workspace"])

        def fixed(arg: Argument) -> NDArray[Any]:
            return memory.view(arg) if arg.kind == "workspace" else self.fixed(arg)

        return SteppedCall(self, entry, sequences, self.collectives.another(), fixed)

    def prefill(self, sequence: Sequence, tokens: Ids, last_only: bool = True) -> Logits:
        """As `Engine.prefill`; the ranks of this one's tensor-parallel and pipeline groups give the same tokens."""
        [logits] = self.feed(sequence, [tokens], last_only)
        return logits

    def feed(self, sequence: Sequence, pieces: List[Ids], last_only: bool = True) -> Iterator[Logits]:
        """As `Engine.feed`; the stages of a pipeline work on different pieces at the same time."""
        more = self.meet(PREFILL + len(pieces) - 1)
        under_way: deque[Started] = deque()
        for piece in pieces:
            arrays, args = self.place_piece(sequence, piece, last_only)
            under_way.append(self._start(self._prefill, arrays, args, len(piece)))
            if len(under_way) > self.world.mesh.pp - 1:
                yield under_way.popleft().finish()
        for _ in range(more):
            self.idle(PREFILL)
        while under_way:
            yield under_way.popleft().finish()

    def decode(self, sequences: List[Sequence], tokens: Iterable[int]) -> Logits:
        """As `Engine.decode`; waits while other ranks have prompts to feed."""
        self.meet(DECODE)
        if self.overlapped is not None:
            return self.overlapped.decode(sequences, list(tokens))
        return self._in_parts(sequences, list(tokens))

    def idle(self, phase: int) -> None:
        """Take part in a call with no token."""
        if phase == PREFILL:
            self._idle(self._prefill)
        elif self.overlapped is not None:
            self.overlapped.decode([], [])
        else:
            self._in_parts([], [])

    def _in_parts(self, sequences: List[Sequence], tokens: List[int]) -> Logits:
        """A decode step in micro-batches, of which the stages of a pipeline have several under way."""
        parts = shares([s.length + 1 for s in sequences], self.micro_batches)
        started = []
        for mine in parts:
            if mine:
                arrays, args = self.place(self._decode, [sequences[i] for i in mine], [tokens[i] for i in mine])
                started.append(self._start(self._decode, arrays, args, len(mine)))
            else:
                self._idle(self._decode)
        found = [one.finish() for one in started]
        if len(found) == 1:
            return found[0]
        logits = np.empty((len(sequences), found[0].shape[1] if found else 0), dtype=np.float32)
        for mine, some in zip((mine for mine in parts if mine), found, strict=True):
            logits[mine] = some
        return logits

    def _start(self, call: Call, arrays: dict[str, NDArray[Any]], args: list[Any], tokens: int) -> Started:
        """Run a call as far as it goes without what later stages compute."""
        late: list[Late] = []
        if isinstance(call, SteppedCall):
            late = call.start(args[0])
        else:
            call.function(*args)
        self.record(call, arrays, tokens)
        # With other calls before its end, the call's own buffer would be written again.
        several = self.world.mesh.pp > 1
        return Started(arrays["logits"].copy() if several else arrays["logits"], late)

    def _idle(self, call: Call) -> None:
        if isinstance(call, SteppedCall):  # without steps nothing is exchanged: nobody waits
            call.function(*call.idle()[1])


@dataclass(eq=False)
class Binding:
    """The arguments of a call for given sizes: tensors of every segment, and the arrays in which collectives work."""

    symbols: dict[str, int]
    step: NDArray[np.int32]
    flat: dict[str, NDArray[Any]]
    segments: dict[Segment, tuple[Callable[..., Any], list[Any]]] = field(default_factory=dict)

    def array(self, view: View) -> NDArray[Any]:
        """The rows of a view that are in use now."""
        shape = tuple(self.symbols[d] if isinstance(d, str) else d for d in view.shape)
        raw = self.flat[view.buffer].view(view.dtype)[view.offset :]
        if len(shape) == 1:
            return raw[: shape[0]]
        inner = int(np.prod(shape[1:]))
        strides = (view.ld * view.dtype.itemsize, view.dtype.itemsize)
        rows = np.lib.stride_tricks.as_strided(raw, (shape[0], inner), strides)
        return rows if len(shape) == 2 else rows.reshape(shape)

    def resize(self, symbol: str, value: int) -> None:
        """Set the rows that a dispatch brought."""
        self.symbols[symbol] = value
        self.step[1] = value


class SteppedCall(Call):
    """One entry as steps: segments of the library, collectives, loops over layers."""

    def __init__(
        self,
        engine: DistributedEngine,
        entry: Entry,
        sequences: int,
        collectives: Collectives,
        fixed: Callable[[Argument], NDArray[Any]],
    ) -> None:
        self._engine = engine
        self._late: list[Late] | None = None
        self.collectives = collectives
        self._workspace = fixed
        self._sizes: dict[tuple[int, int, int], Binding] = {}
        super().__init__(entry, sequences, engine.pool.table_width, engine.library, fixed)
        self._arguments = {a.name: a for a in entry.args}

    def _load(self, entry: Entry) -> Callable[..., Any]:
        return self._run

    def bind(self, tokens: int, rows: int, sequences: int) -> tuple[dict[str, NDArray[Any]], list[Any]]:
        """As `Call.bind`; the argument of `function` is what it prepared."""
        arrays, args = super().bind(tokens, rows, sequences)
        key = (tokens, rows, sequences)
        if key not in self._sizes:
            names = [a.name for a in self._entry.args]
            self._sizes[key] = self._prepare(tokens, rows, arrays, dict(zip(names, args, strict=True)))
        return arrays, [self._sizes[key]]

    def _prepare(self, tokens: int, rows: int, arrays: dict[str, Any], tensors: dict[str, Any]) -> Binding:
        mesh, rank = self._engine.world.mesh, self._engine.world.rank
        each = -(-tokens // mesh.tp)
        mine = min((mesh.index(rank, "tp") + 1) * each, tokens) - min(mesh.index(rank, "tp") * each, tokens)
        symbols = {"T": tokens, "R": rows, "U": mine, "D": 0}
        arrays["step"][:] = (0, 0, mine)
        workspace = self._workspace(self._arguments["workspace"])
        flat = {name: a.reshape(-1) for name, a in {**arrays, "workspace": workspace}.items()}
        binding = Binding(symbols, arrays["step"], flat)
        for segment in segments_of(self._entry.steps):
            function = self._engine.library.function(segment.symbol)
            binding.segments[segment] = (function, [tensors[n] for n in segment.args])
        return binding

    def idle(self) -> tuple[dict[str, NDArray[Any]], list[Any]]:
        """As `bind`, for a rank that takes part with no token."""
        arrays, args = self.bind(tokens=0, rows=0, sequences=1)
        arrays["pages"][:] = 0
        arrays["starts"][:] = 0
        return arrays, args

    def begin(self, binding: Binding) -> tuple[Step, ...]:
        """Announce a call; returns its steps."""
        self._engine.monitor.begin(self._entry.symbol)
        binding.step[2] = binding.symbols["U"]
        return self._entry.steps

    def start(self, binding: Binding) -> list[Late]:
        """Run a call but for what it sends on along the pipeline and what comes back at its end; returns these."""
        late: list[Late] = []
        self._late = late
        try:
            self._run(binding)
        finally:
            self._late = None
        return late

    def _run(self, binding: Binding) -> None:
        self.begin(binding)
        self._steps(self._entry.steps, binding, -1)

    def _steps(self, steps: tuple[Step, ...], binding: Binding, layer: int) -> None:
        for step in steps:
            if isinstance(step, Segment):
                function, args = binding.segments[step]
                function(*args)
            elif isinstance(step, Collective):
                what = f"{step.name}, {step.where}"
                with self._engine.monitor.communication(what, None if layer < 0 else layer):
                    if self._late is not None and may_wait(step):
                        exchange, array = self.collectives.begin(step, binding)
                        if exchange is not None:
                            self._late.append(Late(self._engine.monitor, what, exchange, array))
                    else:
                        self.collectives.run(step, layer, binding)
            else:
                for inner in range(step.first, step.last + 1):
                    binding.step[0] = inner
                    self._steps(step.steps, binding, inner)


def segments_of(steps: tuple[Step, ...]) -> Iterable[Segment]:
    """All segments of some steps."""
    for step in steps:
        if isinstance(step, Segment):
            yield step
        elif isinstance(step, Loop):
            yield from segments_of(step.steps)
