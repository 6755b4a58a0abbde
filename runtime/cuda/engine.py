"""The engine of a GPU artifact: chunks of prompts launch by launch, decode steps as CUDA graphs by batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as List
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.cache import PagePool, Sequence
from moec.runtime.cuda.driver import Driver
from moec.runtime.cuda.executor import Executor
from moec.runtime.cuda.kernel import Kernel, load_kernels
from moec.runtime.cuda.memory import DeviceMemory
from moec.runtime.cuda.program import GpuEntry, GpuPlan, Sizes, symbols
from moec.runtime.engine import Ids, Logits
from moec.runtime.weights import Weights

if TYPE_CHECKING:
    from moec.runtime.artifact import Artifact


def buckets(batch: int) -> list[int]:
    """Batch sizes for which a decode step is captured: powers of two, and the most."""
    sizes = [1 << i for i in range(batch.bit_length()) if 1 << i < batch]
    return [*sizes, batch]


class GpuEngine:
    """Kernels, weights and cache of an artifact on one device; the interface of `runtime.engine.Engine`.

    `library` stands in for the driver library in tests. Raises NoDriver, DriverTooOld, NoDevice, WrongArchitecture,
    DamagedKernel, OutOfMemory or WrongWeights.
    """

    def __init__(
        self,
        artifact: Artifact,
        ordinal: int = 0,
        library: Any = None,
        progress: Callable[[int, int], None] | None = None,
        placed: Mapping[str, int] | None = None,
    ) -> None:
        """`placed`: addresses of weights that lie on the device already, instead of the artifact's."""
        plan = artifact.plan
        assert isinstance(plan, GpuPlan)
        self.plan, self.manifest = plan, artifact.manifest
        self.driver = Driver(ordinal, library=library)
        kernels = load_kernels(artifact.path / "kernels", self.driver)
        # The last page is nobody's: rows that only fill a batch up to its bucket write there.
        self.spare = plan.pages - 1
        self.pool = PagePool(plan.pages - 1, plan.page_size, artifact.manifest.context)
        if placed is None:
            self.weights = Weights(artifact.weights)
        stream = self.driver.stream()
        self.memory = DeviceMemory(
            self.driver,
            plan,
            self.weights if placed is None else placed,
            self.manifest.vocab,
            self.pool.table_width,
            stream,
            progress,
            self._tables(plan),
        )
        self._phases = {n: self._executor(kernels, e) for n, e in plan.entries.items()}
        self.batch = self.manifest.batch
        prompt = plan.entries.get("prefill")
        self.chunk = min(self.manifest.chunk, prompt.max_tokens) if prompt else 1
        self.rows = prompt.max_rows if prompt else 1
        self._buckets = buckets(self.batch)

    def _executor(self, kernels: Mapping[str, Kernel], entry: GpuEntry) -> Executor:
        return Executor(self.driver, kernels, self.memory, entry)

    def _tables(self, plan: GpuPlan) -> NDArray[np.int32] | None:
        """Which copies of experts tokens go to, where other ranks have some."""
        return None

    @property
    def threads(self) -> int:
        """Host threads that run kernels: none of them does."""
        return 1

    def use_threads(self) -> None:
        """Nothing to set up for the calling thread but the device's context."""
        self.driver.make_current()

    def prefill(self, sequence: Sequence, tokens: Ids, last_only: bool = True) -> Logits:
        """As `Engine.prefill`. An artifact for decoding alone takes a prompt token by token."""
        if "prefill" not in self._phases:
            for token in tokens:
                logits = self.decode([sequence], [int(token)])
            return logits
        self.pool.extend(sequence, len(tokens))
        logits = self._prefill(sequence, tokens, last_only, live=len(tokens))
        sequence.length += len(tokens)
        return logits

    def _prefill(self, sequence: Sequence, tokens: Ids, last_only: bool, live: int) -> Logits:
        """A chunk of a sequence that has room for it; the first `live` of its tokens are somebody's."""
        count, rows = len(tokens), 1 if last_only else len(tokens)
        length = sequence.length + count
        put = self.memory.input
        put("ids", count)[:] = tokens
        put("seq", count)[:] = 0
        put("pos", count)[:] = np.arange(sequence.length, length)
        put("pages", self.pool.table_width)[:] = sequence.table
        put("starts", 2)[:] = (0, length)
        put("q_starts", 2)[:] = (0, count)
        put("lengths", 1)[:] = length
        put("rows", rows)[:] = count - 1 if last_only else np.arange(count)
        self._call("prefill", self._symbols(count, rows, 1, length, live), rows, graph=False)
        return self.memory.result(rows, self.manifest.vocab)

    def decode(self, sequences: List[Sequence], tokens: Iterable[int]) -> Logits:
        """As `Engine.decode`; the step is filled up to the next bucket with rows that nobody reads."""
        if "decode" not in self._phases:
            (token,) = tokens
            return self.prefill(sequences[0], np.array([token]))
        for sequence in sequences:
            self.pool.extend(sequence, 1)
        return self._decode(sequences, list(tokens), live=len(sequences))

    def _decode(self, sequences: List[Sequence], tokens: List[int], live: int) -> Logits:
        """A token of each of some sequences that have room for it."""
        count = len(sequences)
        size = next(b for b in self._buckets if b >= count)
        pages = np.full((size, self.pool.table_width), self.spare, dtype=np.int32)
        positions = np.zeros(size, dtype=np.int32)
        for row, sequence in enumerate(sequences):
            pages[row] = sequence.table
            positions[row] = sequence.length
            sequence.length += 1
        put = self.memory.input
        ids = put("ids", size)
        ids[:] = 0
        ids[:count] = tokens
        put("seq", size)[:] = np.arange(size)
        put("rows", size)[:] = np.arange(size)
        put("pos", size)[:] = positions
        put("pages", pages.size)[:] = pages.ravel()
        put("lengths", size)[:] = positions + 1
        put("starts", size + 1)[:] = np.concatenate(([0], np.cumsum(positions + 1)))
        put("q_starts", size + 1)[:] = np.arange(size + 1)
        # One graph serves every length: sizes that follow the longest sequence are taken at the limit.
        self._call("decode", self._symbols(size, size, size, self.manifest.context, live), size, graph=True)
        return self.memory.result(size, self.manifest.vocab)[:count]

    def _symbols(self, tokens: int, rows: int, sequences: int, longest: int, live: int) -> dict[str, int]:
        """The sizes of a call, `live` of whose tokens are somebody's."""
        return symbols(self.plan, self.pool.table_width, tokens, rows, sequences, longest)

    def executor(self, phase: str) -> Executor:
        """What runs a phase, "prefill" or "decode"."""
        return self._phases[phase]

    def timed_replay(self, phase: str) -> Callable[[], float]:
        """A call that replays the phase's last graph and returns the device's microseconds."""
        executor = self._phases[phase]
        start, end = self.driver.event(timing=True), self.driver.event(timing=True)

        def once() -> float:
            self.driver.record(start, executor.main)
            executor.again()
            self.driver.record(end, executor.main)
            self.driver.wait(executor.main)
            return self.driver.elapsed_us(start, end)

        return once

    def timer(self, entry: GpuEntry, kernels: Mapping[str, Kernel], sizes: Sizes) -> Callable[[], float]:
        """A call that runs an entry's steps with these kernels and returns the device's microseconds."""
        executor = Executor(self.driver, kernels, self.memory, entry)
        actions = list(executor.actions(sizes))
        start, end = self.driver.event(timing=True), self.driver.event(timing=True)

        def once() -> float:
            self.driver.record(start, executor.main)
            for action in actions:
                action()
            self.driver.record(end, executor.main)
            self.driver.wait(executor.main)
            return self.driver.elapsed_us(start, end)

        return once

    def _call(self, phase: str, sizes: dict[str, int], rows: int, graph: bool) -> None:
        executor = self._phases[phase]

        def before() -> None:
            self.memory.send(executor.main)

        def after() -> None:
            self.memory.receive(rows, self.manifest.vocab, executor.main)

        (executor.replay if graph else executor.run)(sizes, before, after)
        self._end(executor.main)

    def _end(self, stream: int) -> None:
        """Wait until a call has ended."""
        self.driver.wait(stream)
