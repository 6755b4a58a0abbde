"""`moec.load`: a compiled model that computes logits and generates tokens with its artifact's kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as List
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from moec.runtime.artifact import Artifact, open_artifact
from moec.runtime.cache import Sequence
from moec.runtime.engine import DraftingSteps, Engine, Ids, Logits, Piece, Steps, feed
from moec.runtime.errors import NoRouting, WrongOption, WrongTokens
from moec.runtime.generate import Completions, Stream, complete
from moec.runtime.loads import Loads
from moec.runtime.sampling import Sampling
from moec.runtime.scheduler import Rates, Request, Tell
from moec.runtime.speculate import scheduler_of
from moec.runtime.tokens import as_batch, as_prompts

if TYPE_CHECKING:
    import torch

    from moec.runtime.tokenizer import Tokenizer


def load(path: str | Path, check: bool = False, threads: int | None = None, huge_pages: bool = True) -> Model:
    """Open the artifact at `path` on this machine.

    `check` compares the hashes of weights too. `threads`: how many run the kernels (default: TVM_NUM_THREADS, or every
    CPU that this process may use). `huge_pages`: copy the mapped weights into such in the background, for faster
    reading, where the system has them and the memory suffices. Raises an InputError of `moec.runtime.errors` that says
    why it cannot run.
    """
    return Model(open_artifact(path, check), threads, huge_pages=huge_pages)


class Model:
    """A loaded artifact. One call runs at a time: others wait."""

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        engine: Steps | None = None,
        huge_pages: bool = True,
    ) -> None:
        """`engine` runs the steps in place of the one that the artifact's kind of device has."""
        self.artifact = artifact
        self.engine: Steps = engine or _engine(artifact, threads, huge_pages)
        self._lock = RLock()

    def __repr__(self) -> str:
        m = self.artifact.manifest
        limits = f"batch {m.batch}, context {m.context}, vocabulary {m.vocab}"
        return f"Model({m.model}, {m.recipe}, target {m.target}: {limits}, {self.engine.threads} threads)"

    @property
    def vocab(self) -> int:
        """Size of the vocabulary."""
        return self.artifact.manifest.vocab

    @property
    def context(self) -> int:
        """The most tokens of one sequence."""
        return self.artifact.manifest.context

    @property
    def ranks(self) -> int:
        """Processes that run the model together."""
        return 1

    @property
    def replicas(self) -> int:
        """Data-parallel replicas, each of which takes its share of the sequences."""
        return 1

    @property
    def has_tokenizer(self) -> bool:
        """Whether the artifact can take and give text."""
        return (self.artifact.tokenizer / "tokenizer.json").is_file()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer; raises NoTokenizer when it has none."""
        from moec.runtime.tokenizer import Tokenizer

        return Tokenizer(self.artifact.tokenizer, str(self.artifact.path))

    def logits(self, ids: Any, chunk: int | None = None) -> Logits:
        """Logits f32[B, T, V] after each of `ids` int64[B, T].

        `chunk`: feed each sequence in pieces of at most that many tokens (default and limit: the compiled chunk). With
        1, every token after the first goes through the decode entry, in step for all sequences. Raises WrongTokens,
        EmptyPrompt, PromptTooLong, TokenOutsideVocabulary or WrongOption.
        """
        batch = as_batch(ids, self.artifact.manifest)
        result = np.empty((*batch.shape, self.vocab), dtype=np.float32)
        for rows, columns, logits in self._pieces(batch, chunk):
            result[rows, columns] = logits
        return result

    def losses(self, ids: Any) -> NDArray[np.float64]:
        """-log p(ids[t] | ids[:t]) in nats, f64[T - 1] for t = 1 .. T-1, of `ids` int64[T].

        Holds the logits of one chunk at a time. Raises as `logits`.
        """
        batch = as_batch(np.asarray(ids)[None], self.artifact.manifest)
        losses = np.zeros(batch.shape[1] - 1)
        for _, columns, logits in self._pieces(batch, None):
            targets = batch[0, columns.start + 1 : columns.stop + 1]
            scored = logits[0, : len(targets)].astype(np.float64)
            scored -= scored.max(axis=1, keepdims=True)
            chosen = scored[np.arange(len(targets)), targets]
            losses[columns.start : columns.start + len(targets)] = np.log(np.exp(scored).sum(axis=1)) - chosen
        return losses

    def losses_of(self, windows: List[Any]) -> list[NDArray[np.float64]]:
        """`losses` of each of several windows of tokens."""
        return [self.losses(window) for window in windows]

    def generate(
        self,
        ids: Any,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Iterable[int] | None = None,
        stream: Stream | None = None,
        speculate: int = 0,
        top_k: int = 0,
        min_p: float = 0.0,
    ) -> list[int] | list[list[int]]:
        """The new tokens after `ids`, a list of ids; for several prompts (any lengths) a list of such lists.

        Ends at `max_new_tokens` or at a token in `stop` (default: the model's end-of-sequence tokens; it is part of the
        result). `stream(index of the prompt, token)` is called for every new token; where it returns True that prompt
        ends. Greedy at temperature 0; the same seed gives the same tokens, drawn among the `top_k` most probable (0:
        all), the smallest set of these that reaches `top_p`, and those with `min_p` of the greatest probability.
        `speculate`: so many tokens are drafted a step by the model's multi-token-prediction module, at most as many as
        compiled for: the same tokens at temperature 0, and equally distributed ones above. Raises WrongTokens,
        EmptyPrompt, PromptTooLong, NoRoom, TokenOutsideVocabulary or WrongOption.
        """
        sampling = Sampling(temperature, top_p, seed, top_k, min_p)
        single, done = self._complete(ids, max_new_tokens, sampling, stop, stream, speculate)
        return done.tokens[0] if single else done.tokens

    def complete(
        self,
        ids: Any,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Iterable[int] | None = None,
        stream: Stream | None = None,
        speculate: int = 0,
    ) -> Completions:
        """As `generate`, with the rates: `.tokens` is a list for each prompt, `.rates` tokens and seconds."""
        return self._complete(ids, max_new_tokens, sampling or Sampling(), stop, stream, speculate)[1]

    def draft_logits(self, ids: Any) -> Logits:
        """What the multi-token-prediction module predicts: f32[B, T - 1, V], row t from `ids[: t + 2]` of int64[B, T].

        Row t are the logits of the token after ids[t + 1]. Raises as `logits`, and WrongOption without a module.
        """
        self._check_drafts(1)
        engine = cast(DraftingSteps, self.engine)
        batch = as_batch(ids, self.artifact.manifest)
        result = np.empty((len(batch), batch.shape[1] - 1, self.vocab), dtype=np.float32)
        with self._lock:
            engine.use_threads()
            for row, tokens in enumerate(batch):
                sequence = engine.pool.open()
                try:
                    for begin in range(0, len(tokens) - 1, engine.chunk):
                        end = min(begin + engine.chunk, len(tokens) - 1)
                        engine.prefill(sequence, tokens[begin:end])
                        piece = Piece(begin, tokens[begin + 1 : end + 1], engine.states.copy())
                        result[row, begin:end] = engine.draft([sequence], [piece], last_only=False)
                finally:
                    engine.pool.close(sequence)
        return result

    def serve(self, stream: Tell | None = None, speculate: int = 0) -> Server:
        """A server of requests that arrive over time; see `Server`. `stream(request, token)`: every new token, of which
        True ends the request.

        `speculate`: as of `generate`; raises WrongOption.
        """
        self._check_drafts(speculate)
        return Server(self, stream, speculate)

    def _check_drafts(self, drafts: int) -> None:
        most = self.artifact.manifest.drafts
        if not 0 <= drafts <= most:
            expected = f"0 to {most}, as compiled" if most else "0: compile with --mtp 1 for a module that drafts"
            raise WrongOption(option="speculate", expected=expected, value=drafts)

    def record_loads(self) -> None:
        """Count from here on which experts tokens are sent to; see `recorded_loads`. Raises NoRouting."""
        if not isinstance(self.engine, Engine):
            raise NoRouting(path=self.artifact.path, why="the engine of this device does not tell them")
        self.engine.record_loads(str(self.artifact.path))

    def recorded_loads(self) -> Loads:
        """Counts by layer and expert, and by pair of experts, since `record_loads`."""
        assert isinstance(self.engine, Engine) and self.engine.recorder is not None
        return self.engine.recorder.loads()

    def as_module(self) -> torch.nn.Module:
        """A torch.nn.Module whose forward maps int64[B, T] to logits f32[B, T, V]; it has no gradients."""
        from moec.runtime.torch_module import ArtifactModule

        return ArtifactModule(self)

    def _complete(
        self, ids: Any, new: int, sampling: Sampling, stop: Iterable[int] | None, stream: Stream | None, drafts: int
    ) -> tuple[bool, Completions]:
        prompts, single = self._prompts(ids, new)
        self._check_drafts(drafts)
        return single, self._run(prompts, new, sampling, stop, stream, drafts)

    def _prompts(self, ids: Any, new: int) -> tuple[list[Ids], bool]:
        if new < 1:
            raise WrongOption(option="max-new-tokens", expected="at least 1", value=new)
        return as_prompts(ids, self.artifact.manifest, new)

    def _run(
        self,
        prompts: list[Ids],
        new: int,
        sampling: Sampling,
        stop: Iterable[int] | None,
        stream: Stream | None,
        drafts: int = 0,
    ) -> Completions:
        ends = self._ends(stop)
        with self._lock:
            self.engine.use_threads()
            return complete(self.engine, prompts, new, sampling, ends, stream, drafts)

    def _ends(self, stop: Iterable[int] | None) -> frozenset[int]:
        """The tokens that end a sequence."""
        return frozenset(self.artifact.manifest.eos_token_ids if stop is None else stop)

    def _pieces(self, batch: Ids, chunk: int | None) -> Iterator[tuple[slice, slice, Logits]]:
        """(rows, columns, logits f32[rows, columns, V]) in turn until all of `batch` is covered."""
        if chunk is not None and chunk < 1:
            raise WrongOption(option="chunk", expected="at least 1", value=chunk)
        size = min(chunk or self.engine.chunk, self.engine.chunk, self.engine.rows)
        width = self.engine.batch if chunk == 1 else 1
        with self._lock:
            self.engine.use_threads()
            for start in range(0, len(batch), width):
                group = batch[start : start + width]
                sequences = [self.engine.pool.open() for _ in group]
                try:
                    for rows, columns, logits in _feed(self.engine, group, sequences, size, chunk == 1):
                        yield slice(start + rows.start, start + rows.stop), columns, logits
                finally:
                    for sequence in sequences:
                        self.engine.pool.close(sequence)


class Server:
    """Requests of a model that arrive over time: `submit` them, and `step` until they are done.

        server = model.serve()
        first = server.submit([1, 2, 3], max_new_tokens=16)
        server.step()                       # a chunk of a prompt and a token of every live sequence
        second = server.submit([4, 5], max_new_tokens=8)
        server.run()                        # until nothing is left
        first.tokens, second.tokens

    What a request gives does not depend on the others. One thread at a time.
    """

    def __init__(self, model: Model, stream: Tell | None = None, drafts: int = 0) -> None:
        self._model = model
        self._scheduler = scheduler_of(model.engine, drafts, stream)

    @property
    def rates(self) -> Rates:
        """Tokens and seconds so far."""
        return self._scheduler.rates

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.busy

    def submit(
        self,
        ids: Any,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Iterable[int] | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        place: int | None = None,
    ) -> Request:
        """Queue one prompt; raises as `Model.generate`.

        `place`: which of the seed's sequences of random numbers it draws by (default: its place in the queue).
        """
        prompts, single = self._model._prompts(list(ids), max_new_tokens)
        if not single:
            raise WrongTokens(problem="a request is one prompt: give one list of ids")
        sampling = Sampling(temperature, top_p, seed, top_k, min_p)
        return self._scheduler.submit(prompts[0], max_new_tokens, sampling, self._model._ends(stop), place)

    def step(self) -> list[Request]:
        """Advance every live request; returns those that ended."""
        with self._model._lock:
            self._model.engine.use_threads()
            return self._scheduler.step()

    def run(self) -> None:
        """Step until no request is left."""
        while self.busy:
            self.step()

    def close(self) -> None:
        """Drop what is unfinished and free its pages."""
        with self._model._lock:
            self._scheduler.close()


def _engine(artifact: Artifact, threads: int | None, huge_pages: bool) -> Steps:
    """The engine of the artifact's kind of device."""
    if artifact.manifest.kind == "cpu":
        return Engine(artifact, threads, huge_pages)
    from moec.runtime.cuda.engine import GpuEngine

    return GpuEngine(artifact)


def _feed(
    engine: Steps, group: Ids, sequences: list[Sequence], size: int, stepwise: bool
) -> Iterator[tuple[slice, slice, Logits]]:
    """Prefill each sequence in pieces of `size`, or, `stepwise`, its first token, then decode all in step."""
    tokens = group.shape[1]
    for row, sequence in enumerate(sequences):
        begins = range(0, 1 if stepwise else tokens, size)
        pieces = [group[row, begin : begin + size] for begin in begins]
        for begin, logits in zip(begins, feed(engine, sequence, pieces, last_only=False), strict=True):
            yield slice(row, row + 1), slice(begin, begin + len(logits)), logits[None]
    for column in range(1, tokens if stepwise else 1):
        yield slice(0, len(group)), slice(column, column + 1), engine.decode(sequences, group[:, column])[:, None]
