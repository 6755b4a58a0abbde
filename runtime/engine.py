"""The executor: one native call for a chunk of a prompt, one for a step of all live sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moec.runtime.artifact import Artifact
from moec.runtime.cache import PagePool, Sequence
from moec.runtime.errors import NoRouting
from moec.runtime.library import Library
from moec.runtime.loads import LoadRecorder
from moec.runtime.memory import Memory, aligned_zeros
from moec.runtime.plan import Argument, Entry, Plan, Routing
from moec.runtime.sampling import Draw
from moec.runtime.weights import Weights

_FEW: Final = 16
"""Tokens of a sequence that are set number by number."""
_STEP_INPUTS: Final = ("ids", "seq", "pos", "pages", "starts", "rows")
Logits = NDArray[np.float32]
States = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """What a draft continues from: `hidden` f32[n, H], the states of a sequence's positions from `first` on, and `ids`,
    the n tokens at the positions behind them."""

    first: int
    ids: List[int] | Ids
    hidden: States


class Steps(Protocol):
    """What runs a model's steps on some device: prefill for a chunk of one sequence, decode for a token of each."""

    pool: PagePool
    chunk: int
    rows: int
    batch: int
    weights: Weights

    @property
    def threads(self) -> int:
        """Host threads that run kernels."""

    def prefill(self, sequence: Sequence, tokens: Ids, last_only: bool = True) -> Logits:
        """As `Engine.prefill`."""

    def decode(self, sequences: List[Sequence], tokens: Iterable[int]) -> Logits:
        """As `Engine.decode`."""

    def use_threads(self) -> None:
        """Set up the calling thread."""


@runtime_checkable
class DrawingSteps(Protocol):
    """Steps whose device draws tokens itself, where `draws` says so: logits stay there."""

    draws: bool

    def prefill_draw(self, sequence: Sequence, tokens: Ids, draw: Draw | None) -> int:
        """As `Engine.prefill`; the token after the last one, or without a draw any."""

    def decode_draw(self, sequences: List[Sequence], tokens: List[int], draws: List[Draw]) -> list[int]:
        """As `Engine.decode`; the token after each sequence."""


class DraftingSteps(Steps, Protocol):
    """Steps of a model with a multi-token-prediction module."""

    @property
    def drafts(self) -> int:
        """Most tokens of a sequence that `verify` takes besides its next one."""

    @property
    def states(self) -> States:
        """As `Engine.states`."""

    def verify(self, sequences: List[Sequence], tokens: List[List[int]]) -> Logits:
        """As `Engine.verify`."""

    def draft(self, sequences: List[Sequence], pieces: List[Piece], last_only: bool = True) -> Logits:
        """As `Engine.draft`."""


def feed(engine: Steps, sequence: Sequence, pieces: List[Ids], last_only: bool = True) -> Iterator[Logits]:
    """As `Engine.feed`, of any engine."""
    if isinstance(engine, Engine):
        return engine.feed(sequence, pieces, last_only)
    return (engine.prefill(sequence, piece, last_only) for piece in pieces)


class Engine:
    """Kernels, weights and cache of an artifact. Not for two threads at once: calls share their buffers."""

    pieces = 1
    """Chunks of a prompt that are worth giving to `feed` together."""

    def __init__(self, artifact: Artifact, threads: int | None = None, huge_pages: bool = True) -> None:
        """Load kernels and weights of the artifact; raises NoRuntimeLibrary, KernelsDoNotLoad or WrongWeights."""
        plan = artifact.plan
        assert isinstance(plan, Plan)
        self.library = Library(artifact.kernels, threads)
        self.weights = Weights(artifact.weights, huge_pages)
        self.pool = PagePool(plan.pages, plan.page_size, artifact.manifest.context)
        entries = [plan.prefill, plan.decode, *([plan.draft] if plan.draft else [])]
        self.memory = Memory([a for entry in entries for a in entry.args if a.kind in ("cache", "workspace")])
        self.chunk = min(artifact.manifest.chunk, plan.prefill.max_tokens)
        self.rows = plan.prefill.max_rows
        self.batch = artifact.manifest.batch
        self.drafts = artifact.manifest.drafts
        self.states = np.empty((0, 0), dtype=np.float32)
        """Hidden states of the last call: f32[T, H] of its tokens, after a draft f32[R, H] of the rows whose logits
        were wanted. A view that the next call overwrites; only of artifacts with a draft module."""
        self._prefill = self._entry(plan.prefill, sequences=1)
        self._decode = self._entry(plan.decode, sequences=self.batch)
        self._draft = self._entry(plan.draft, sequences=self.batch) if plan.draft else None
        self.recorder: LoadRecorder | None = None
        """Set: takes the experts that every token is sent to."""

    @property
    def threads(self) -> int:
        """Threads that run the kernels."""
        return self.library.threads

    def use_threads(self) -> None:
        """Give the calling thread's pool this engine's number of threads."""
        self.library.use_threads()

    def fixed(self, arg: Argument) -> NDArray[np.generic]:
        """The memory of a weight, a cache or a workspace."""
        return self.weights.view(arg) if arg.kind == "weight" else self.memory.view(arg)

    def _entry(self, entry: Entry, sequences: int) -> Call:
        return Call(entry, sequences, self.pool.table_width, self.library, self.fixed)

    def record_loads(self, path: str) -> None:
        """Count from here on which experts tokens are sent to, in `recorder`; raises NoRouting."""
        routing = self._decode.routing
        if routing is None:
            why = "it has no routers, or was compiled by a version of moec that did not tell them"
            raise NoRouting(path=path, why=why)
        self.recorder = LoadRecorder(routing.layers, routing.experts)

    def record(self, call: Call, arrays: dict[str, NDArray[Any]], tokens: int) -> None:
        """Count what a call of so many tokens left."""
        if self.recorder is not None and call.routing is not None:
            self.recorder.add(arrays["routed"][:, : self._routed_rows(call.routing, tokens)])

    def _routed_rows(self, routing: Routing, tokens: int) -> int:
        """Tokens of a call whose choices this process counts."""
        return tokens

    def call(self, phase: str) -> Call:
        """The call of an entry: "prefill", "decode" or, where there is one, "draft"."""
        found = {"prefill": self._prefill, "decode": self._decode, "draft": self._draft}[phase]
        assert found is not None
        return found

    def prefill(self, sequence: Sequence, tokens: Ids, last_only: bool = True) -> Logits:
        """Append `tokens` int64[T], T <= chunk, to `sequence`.

        Returns f32[1, V], the logits after the last token, or with `last_only=False` (T <= rows) f32[T, V], those
        after each. The result is a view that the next call overwrites.
        """
        arrays, args = self.place_piece(sequence, tokens, last_only)
        self._prefill.function(*args)
        self.record(self._prefill, arrays, len(tokens))
        return self._results(arrays)

    def place_piece(
        self, sequence: Sequence, tokens: Ids, last_only: bool
    ) -> tuple[dict[str, NDArray[Any]], list[Any]]:
        """Make room for a chunk of a sequence and fill the arguments of a prefill call."""
        count = len(tokens)
        self.pool.extend(sequence, count)
        arrays, args = self._prefill.bind(tokens=count, rows=1 if last_only else count, sequences=1)
        arrays["ids"][:] = tokens
        arrays["seq"][:] = 0
        arrays["pos"][:] = np.arange(sequence.length, sequence.length + count)
        arrays["pages"][0] = sequence.table
        arrays["starts"][:] = (0, sequence.length + count)
        arrays["rows"][:] = count - 1 if last_only else np.arange(count)
        sequence.length += count
        return arrays, args

    def feed(self, sequence: Sequence, pieces: List[Ids], last_only: bool = True) -> Iterator[Logits]:
        """`prefill` of one piece after the other; what it gives has to be taken to the end."""
        for piece in pieces:
            yield self.prefill(sequence, piece, last_only)

    def decode(self, sequences: List[Sequence], tokens: Iterable[int]) -> Logits:
        """Append one token to each of B <= batch sequences; returns f32[B, V], a view that the next call overwrites."""
        arrays, args = self.place(self._decode, sequences, tokens)
        self._decode.function(*args)
        self.record(self._decode, arrays, len(arrays["ids"]))
        return self._results(arrays)

    def verify(self, sequences: List[Sequence], tokens: List[List[int]]) -> Logits:
        """Append 1 to 1 + `drafts` tokens to each of B <= batch sequences in one step.

        Returns f32[sum of tokens, V], the logits after each, sequence by sequence; a view that the next call
        overwrites. Tokens that turn out wrong go with `PagePool.truncate`.
        """
        for sequence, few in zip(sequences, tokens, strict=True):
            self.pool.extend(sequence, len(few))
        firsts = [s.length for s in sequences]
        arrays, args = self._several(self._decode, sequences, firsts, tokens, last_only=False)
        self._decode.function(*args)
        self.record(self._decode, arrays, len(arrays["ids"]))
        for sequence, few in zip(sequences, tokens, strict=True):
            sequence.length += len(few)
        return self._results(arrays)

    def draft(self, sequences: List[Sequence], pieces: List[Piece], last_only: bool = True) -> Logits:
        """Run the multi-token-prediction module over a piece of each of B <= batch sequences.

        A piece has 1 to 1 + `drafts` tokens; one sequence alone may have a chunk. Earlier positions must have been
        given before; those from `first` on are written anew. Returns f32[B, V], the logits of the token after each
        piece, or with `last_only=False` those after each of its tokens; a view that the next call overwrites.
        """
        call = self.call("draft")
        for sequence, piece in zip(sequences, pieces, strict=True):
            self.pool.extend(sequence, max(0, piece.first + len(piece.ids) - sequence.length))
        firsts, ids = [p.first for p in pieces], [p.ids for p in pieces]
        arrays, args = self._several(call, sequences, firsts, ids, last_only)
        begin = 0
        for piece in pieces:
            arrays["hidden"][begin : begin + len(piece.ids)] = piece.hidden
            begin += len(piece.ids)
        call.function(*args)
        return self._results(arrays)

    def _several(
        self,
        call: Call,
        sequences: List[Sequence],
        firsts: List[int],
        tokens: List[List[int]] | List[List[int] | Ids],
        last_only: bool,
    ) -> tuple[dict[str, NDArray[Any]], list[Any]]:
        """Arguments of a call with several tokens of each sequence, those of sequence b from position firsts[b] on."""
        total = sum(map(len, tokens))
        wanted = len(sequences) if last_only else total
        arrays, args = call.bind(tokens=total, rows=wanted, sequences=len(sequences))
        ids, seq, pos, pages, starts, rows = (arrays[name] for name in _STEP_INPUTS)
        starts[0] = begin = cached = 0
        for row, (sequence, first, few) in enumerate(zip(sequences, firsts, tokens, strict=True)):
            end = begin + len(few)
            if len(few) > _FEW:
                ids[begin:end], seq[begin:end], pos[begin:end] = few, row, np.arange(first, first + len(few))
            else:  # as in `place`
                for at, token in enumerate(few, begin):
                    ids[at], seq[at], pos[at] = token, row, first + at - begin
            pages[row] = sequence.table
            starts[row + 1] = cached = cached + first + len(few)
            if last_only:
                rows[row] = end - 1
            begin = end
        if not last_only:
            rows[:] = np.arange(total)
        return arrays, args

    def _results(self, arrays: dict[str, NDArray[Any]]) -> Logits:
        if "states" in arrays:
            self.states = arrays["states"]
        return arrays["logits"]

    def place(
        self, call: Call, sequences: List[Sequence], tokens: Iterable[int]
    ) -> tuple[dict[str, NDArray[Any]], list[Any]]:
        """Make room for one token of each sequence and fill the arguments of a decode call."""
        count = len(sequences)
        arrays, args = call.bind(tokens=count, rows=count, sequences=count)
        ids, seq, pos, pages, starts, rows = (arrays[name] for name in _STEP_INPUTS)
        # Number by number: for few sequences faster than whole arrays, whose every assignment costs a microsecond.
        starts[0] = cached = 0
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            self.pool.extend(sequence, 1)
            pages[row] = sequence.table
            pos[row] = sequence.length
            sequence.length += 1
            starts[row + 1] = cached = cached + sequence.length
            ids[row], seq[row], rows[row] = token, row, row
        return arrays, args


class Call:
    """One entry with its buffers, and the argument list for each combination of sizes that occurred."""

    def __init__(
        self,
        entry: Entry,
        sequences: int,
        table_width: int,
        library: Library,
        fixed: Callable[[Argument], NDArray[np.generic]],
    ) -> None:
        self._entry = entry
        self._library = library
        self.function = self._load(entry)
        self._table_width = table_width
        self._fixed = {a.name: library.tensor(fixed(a)) for a in entry.args if a.kind not in ("input", "output")}
        largest = self._symbols(entry.max_tokens, entry.max_rows, sequences)
        self._buffers = {
            a.name: aligned_zeros(int(np.prod(a.sizes(largest), dtype=np.int64)) * a.dtype.itemsize)
            for a in entry.args
            if a.kind in ("input", "output")
        }
        self._bound: dict[tuple[int, int, int], tuple[dict[str, Any], list[Any]]] = {}

    @property
    def routing(self) -> Routing | None:
        """What the output `routed` holds, where there is one."""
        return self._entry.routing

    def _load(self, entry: Entry) -> Callable[..., Any]:
        return self._library.function(entry.symbol)

    def bind(self, tokens: int, rows: int, sequences: int) -> tuple[dict[str, NDArray[Any]], list[Any]]:
        """Arrays to fill by name, and the arguments of the call, for exactly these sizes."""
        key = (tokens, rows, sequences)
        if key not in self._bound:
            self._bound[key] = self._views(self._symbols(*key))
        return self._bound[key]

    def _symbols(self, tokens: int, rows: int, sequences: int) -> dict[str, int]:
        return {"T": tokens, "R": rows, "B": sequences, "B+1": sequences + 1, "N": self._table_width}

    def _views(self, symbols: dict[str, int]) -> tuple[dict[str, Any], list[Any]]:
        arrays: dict[str, Any] = {}
        args = []
        for arg in self._entry.args:
            if arg.name in self._fixed:
                args.append(self._fixed[arg.name])
                continue
            shape = arg.sizes(symbols)
            size = int(np.prod(shape, dtype=np.int64)) * arg.dtype.itemsize
            arrays[arg.name] = self._buffers[arg.name][:size].view(arg.dtype).reshape(shape)
            args.append(self._library.tensor(arrays[arg.name]))
        return arrays, args
