"""The engine of a GPU artifact: chunks of prompts launch by launch, decode steps as CUDA graphs by batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.cache import PagePool, Sequence
from moec.runtime.cuda.driver import Driver
from moec.runtime.cuda.executor import Executor
from moec.runtime.cuda.inputs import Inputs, inputs_of
from moec.runtime.cuda.kernel import Kernel, load_kernels
from moec.runtime.cuda.memory import DeviceMemory
from moec.runtime.cuda.program import GpuEntry, GpuPlan, Sizes, symbols
from moec.runtime.engine import Ids, Logits, Piece, States
from moec.runtime.sampling import Draw, Sampling
from moec.runtime.weights import Weights

if TYPE_CHECKING:
    from moec.runtime.artifact import Artifact


def buckets(batch: int) -> list[int]:
    """Batch sizes for which a decode step is captured: powers of two, and the most."""
    sizes = [1 << i for i in range(batch.bit_length()) if 1 << i < batch]
    return [*sizes, batch]


def exact(count: int) -> int:
    """No more sequences than there are."""
    return count


@dataclass(frozen=True)
class Ran:
    """A call that has ended: what it left on the host, in rows from `first` on for each micro-batch."""

    memory: DeviceMemory
    vocab: int
    spans: tuple[tuple[int, int], ...]
    order: tuple[int, ...] = ()
    """Of micro-batches: which sequence each row is of, in the order of the spans."""

    def logits(self) -> Logits:
        """f32[wanted rows, V], a view that the next call overwrites."""
        whole = self.memory.result(max(first + count for first, count in self.spans), self.vocab)
        return whole[: self.spans[0][1]] if len(self.spans) == 1 else whole[self._rows()]

    def drawn(self) -> list[int]:
        """The tokens of the wanted rows."""
        tokens = self.memory.result_tokens(max(first + count for first, count in self.spans))
        return [tokens[row] for row in self._rows()]

    def _rows(self) -> list[int]:
        rows = [first + i for first, count in self.spans for i in range(count)]
        if not self.order:
            return rows
        return [row for _, row in sorted(zip(self.order, rows, strict=True))]


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
        kernels = self._kernels = load_kernels(artifact.path / "kernels", self.driver)
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
        self._draw_phases: dict[str, Executor] = {}
        self.draws = bool(plan.draw)
        self.batch = self.manifest.batch
        prompt = plan.entries.get("prefill")
        self.chunk = min(self.manifest.chunk, prompt.max_tokens) if prompt else 1
        self.rows = prompt.max_rows if prompt else 1
        self.drafts = self.manifest.drafts
        # With drafts a sequence may count as several, one for each of its tokens.
        self._buckets = sorted({*buckets(self.batch), *buckets(self.batch * (1 + self.drafts))})
        self.states: States = np.empty((0, 0), dtype=np.float32)
        """As `Engine.states`."""

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
            found = [(self.decode([sequence], [int(token)]).copy(), self.states) for token in tokens]
            self.states = np.concatenate([states for _, states in found])
            return found[-1][0] if last_only else np.concatenate([logits for logits, _ in found])
        return self._prefill(sequence, tokens, last_only).logits()

    def prefill_draw(self, sequence: Sequence, tokens: Ids, draw: Draw | None) -> int:
        """As `prefill`; the token that is drawn after the last one, without a draw the most probable one."""
        draw = draw or Draw(Sampling(), 0, 0)
        if "prefill" not in self._phases:
            drawn = [self.decode_draw([sequence], [int(token)], [draw])[0] for token in tokens]
            return drawn[-1]
        return self._prefill(sequence, tokens, True, [draw]).drawn()[0]

    def _prefill(self, sequence: Sequence, tokens: Ids, last_only: bool, draws: List[Draw] = ()) -> Ran:
        self._ready("prefill")
        self.pool.extend(sequence, len(tokens))
        given = self._inputs([sequence], [sequence.length], [tokens], last_only, exact)
        ran = self._run("prefill", [given], graph=False, draws=draws)
        sequence.length += len(tokens)
        return ran

    def decode(self, sequences: List[Sequence], tokens: Iterable[int]) -> Logits:
        """As `Engine.decode`; the step is filled up to the next bucket with rows that nobody reads."""
        if "decode" not in self._phases:
            (token,) = tokens
            return self.prefill(sequences[0], np.array([token]))
        return self.verify(sequences, [[token] for token in tokens])

    def decode_draw(self, sequences: List[Sequence], tokens: List[int], draws: List[Draw]) -> list[int]:
        """As `decode`; the token that is drawn after each sequence."""
        if "decode" not in self._phases:
            return [self.prefill_draw(sequences[0], np.array(tokens), draws[0])]
        return self._decode(sequences, [[token] for token in tokens], draws).drawn()

    def verify(self, sequences: List[Sequence], tokens: List[List[int]]) -> Logits:
        """As `Engine.verify`."""
        return self._decode(sequences, tokens).logits()

    def _decode(self, sequences: List[Sequence], tokens: List[List[int]], draws: List[Draw] = ()) -> Ran:
        self._ready("decode")
        for sequence, few in zip(sequences, tokens, strict=True):
            self.pool.extend(sequence, len(few))
        ran = self._call_decode(sequences, tokens, draws)
        for sequence, few in zip(sequences, tokens, strict=True):
            sequence.length += len(few)
        return ran

    def _call_decode(self, sequences: List[Sequence], tokens: List[List[int]], draws: List[Draw]) -> Ran:
        given = self._inputs(sequences, [s.length for s in sequences], tokens, False, self._bucket)
        return self._run("decode", [given], graph=True, draws=draws)

    def _ready(self, phase: str) -> None:
        """Nobody else has to do the same phase."""

    def draft(self, sequences: List[Sequence], pieces: List[Piece], last_only: bool = True) -> Logits:
        """As `Engine.draft`; a chunk of a prompt goes through in pieces."""
        for sequence, piece in zip(sequences, pieces, strict=True):
            self.pool.extend(sequence, max(0, piece.first + len(piece.ids) - sequence.length))
        most = self.plan.entries["draft"].max_tokens
        if len(pieces) == 1 and len(pieces[0].ids) > most:
            (whole,) = pieces
            done = []
            for at in range(0, len(whole.ids), most):
                part = Piece(whole.first + at, whole.ids[at : at + most], whole.hidden[at : at + most])
                done.append(self.draft(sequences, [part], last_only).copy())
            return done[-1] if last_only else np.concatenate(done)
        ids: list[list[int] | Ids] = [p.ids for p in pieces]  # type: ignore[misc]
        step = max(map(len, ids)) <= 1 + self.drafts
        given = self._inputs(sequences, [p.first for p in pieces], ids, last_only, self._bucket if step else exact)
        hidden = np.zeros((given.tokens, pieces[0].hidden.shape[1]), dtype=np.float32)
        hidden[: given.count] = np.concatenate([p.hidden for p in pieces])
        return self._run("draft", [given], graph=step, hidden=hidden).logits()

    def _bucket(self, count: int) -> int:
        """The next number of sequences that has a graph."""
        return next(b for b in self._buckets if b >= count)

    def _inputs(
        self, sequences: List[Sequence], firsts: List[int], tokens: List[List[int] | Ids] | List[List[int]],
        last_only: bool, bucket: Callable[[int], int],
    ) -> Inputs:  # fmt: skip
        return inputs_of(sequences, firsts, tokens, last_only, self.spare, self.pool.table_width, bucket)

    def _run(
        self, phase: str, parts: List[Inputs], graph: bool, hidden: States | None = None, draws: List[Draw] = ()
    ) -> Ran:  # fmt: skip
        """A call of a phase with what each micro-batch is given; with `draws`, one for each wanted row, tokens come
        back and logits stay on the device."""
        memory, vocab, entry = self.memory, self.manifest.vocab, self.plan.entries[phase]
        executor = self._drawing(phase) if draws else self._phases[phase]
        room = entry.most(entry.max_rows)
        sizes: dict[str, int] = {}
        asked = list(draws)
        # One graph serves every length: sizes that follow the longest sequence are taken at the limit.
        longest = self.manifest.context if graph else max(given.longest for given in parts)
        for number, given in enumerate(parts):
            k = str(number) if entry.parts > 1 else ""
            end = f"_{k}" if k else ""
            for name, array in given.arrays.items():
                memory.input(name + end, len(array))[:] = array
            if draws:
                self._ask(asked[: given.wanted], given.rows, end)
                del asked[: given.wanted]
            sizes |= self._symbols(given, longest, k)
        only = parts[0]
        states = 0 if not self.drafts else only.rows if phase == "draft" else only.tokens

        def before() -> None:
            memory.send(executor.main)

        def after() -> None:
            for number, given in enumerate(parts):
                if draws:
                    memory.receive_tokens(number * room, given.rows, executor.main)
                else:
                    memory.receive(number * room, given.rows, vocab, executor.main)
            if states:
                memory.receive_states(states, executor.main)

        if hidden is not None:
            memory.send_hidden(hidden, executor.main)
        (executor.replay if graph else executor.run)(sizes, before, after)
        self._end(executor.main)
        if states:
            self.states = memory.result_states(states)[: only.wanted if phase == "draft" else only.count]
        return Ran(memory, vocab, tuple((number * room, given.wanted) for number, given in enumerate(parts)))

    def _drawing(self, phase: str) -> Executor:
        """What runs a phase and draws tokens behind it."""
        if phase not in self._draw_phases:
            entry = self.plan.entries[phase]
            draws = [self._draw_step(entry, k) for k in range(entry.parts)] if entry.parts > 1 else [self.plan.draw]
            self._draw_phases[phase] = self._executor(self._kernels, replace(entry, steps=(*entry.steps, *draws)))
        return self._draw_phases[phase]

    def _draw_step(self, entry: GpuEntry, k: int) -> Mapping[str, Any]:
        """The draw of a micro-batch: its inputs, and its rows of logits and tokens."""
        first = k * entry.most(entry.max_rows)
        bytes_ = {"logits": 4 * self.manifest.vocab, "tokens": 4}
        given = {}
        for name, value in self.plan.draw["arguments"].items():
            if isinstance(value, Mapping) and value["base"] == "input":
                value = {**value, "name": f"{value['name']}_{k}"}
            elif isinstance(value, Mapping):
                value = {**value, "offset": value["offset"] + first * bytes_[value["name"]]}
            given[name] = value
        return {**self.plan.draw, "grid": [f"R{k}"], "arguments": given}

    def _ask(self, draws: List[Draw], rows: int, end: str) -> None:
        """Give the device the options of every row; rows that nobody wants are greedy."""
        put = self.memory.input
        whole = {n: put(n + end, rows) for n in ("temperature", "top_k", "top_p", "min_p", "number")}
        floats = {n: whole[n].view(np.float32) for n in ("temperature", "top_p", "min_p")}
        keys = put(f"key{end}", 2 * rows).view(np.uint64)
        whole["temperature"][:] = 0
        for row, draw in enumerate(draws):
            for name, array in floats.items():
                array[row] = getattr(draw.sampling, name)
            whole["top_k"][row] = min(draw.sampling.top_k, self.manifest.vocab)
            whole["number"][row], keys[row] = draw.number, draw.key

    def _symbols(self, given: Inputs, longest: int, k: str) -> dict[str, int]:
        """The sizes of a call, or of its micro-batch `k`."""
        return symbols(self.pool.table_width, given.tokens, given.rows, given.sequences, longest, k)

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

    def _end(self, stream: int) -> None:
        """Wait until a call has ended."""
        self.driver.wait(stream)
