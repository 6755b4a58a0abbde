"""Speculative decoding with the model's own multi-token-prediction module (DeepSeek-V3, arXiv 2412.19437, sec. 2.2).

A step drafts up to `drafts` tokens of every sequence, one after the other, and verifies them together with the
sequence's next token in one call of the model: a token that the model agrees with is kept, and behind the last kept one
stands the model's own. What comes out is what the model gives alone; only the number of its steps is smaller.

The module follows the model by one token: with L tokens in the cache it needs the states of the first L positions and
the tokens behind them, of which the last is the one that was drawn but not fed yet. Drafting a second token feeds the
module its own state and its own token, at positions that are written anew once the model has seen them.
"""

from __future__ import annotations

from time import perf_counter
from typing import cast

import numpy as np

from moec.runtime.engine import DraftingSteps, Logits, Piece, States, Steps
from moec.runtime.sampling import Proposal
from moec.runtime.scheduler import Request, Scheduler, Tell


class Speculation(Scheduler):
    """A scheduler whose decode steps give each sequence 1 to 1 + `drafts` tokens."""

    def __init__(self, engine: DraftingSteps, drafts: int, stream: Tell | None = None) -> None:
        super().__init__(engine, stream)
        self.drafting = engine
        self.drafts = drafts
        self._ahead: dict[Request, States] = {}
        """States f32[n, H] of the last n positions in the cache that the module has not seen."""

    def close(self) -> None:
        super().close()
        self._ahead.clear()

    def _prefill(self, request: Request) -> None:
        assert request.sequence is not None
        sequence, begin = request.sequence, request.filled
        super()._prefill(request)
        if request.done:
            return
        began = perf_counter()
        states = self.drafting.states.copy()
        if begin:
            states = np.concatenate((self._ahead[request], states))
        first = begin - bool(begin)
        # The token behind the last position of a chunk comes with the next one.
        ids = request.prompt[first + 1 : request.filled]
        for at in range(0, len(ids), self.engine.chunk):
            piece = ids[at : at + self.engine.chunk]
            self.drafting.draft([sequence], [Piece(first + at, piece, states[at : at + len(piece)])])
        self._ahead[request] = states[len(ids) :]
        self.rates.prefill_seconds += perf_counter() - began

    def _decode(self, requests: list[Request]) -> None:
        if not requests:
            return
        began = perf_counter()
        proposals = self._draft(requests)
        self.rates.draft_seconds += perf_counter() - began
        sequences = [r.sequence for r in requests if r.sequence is not None]
        fed = [[r.tokens[-1], *(p.token for p in proposals[r])] for r in requests]
        lengths = [s.length for s in sequences]
        logits, states = self.drafting.verify(sequences, fed), self.drafting.states
        row = 0
        for request, sequence, length, few in zip(requests, sequences, lengths, fed, strict=True):
            kept = self._verify(request, proposals[request], logits[row : row + len(few)])
            if not request.done:
                self.engine.pool.truncate(sequence, length + 1 + kept)
                self._ahead[request] = states[row : row + 1 + kept].copy()
            row += len(few)
        self.rates.decode_steps += 1
        self.rates.decode_seconds += perf_counter() - began

    def _draft(self, requests: list[Request]) -> dict[Request, list[Proposal]]:
        """Up to `drafts` tokens for each request, no more than it may still take before its last one."""
        proposals: dict[Request, list[Proposal]] = {r: [] for r in requests}
        wanted = {r: min(self.drafts, r.new_tokens - len(r.tokens) - 1) for r in requests}
        pieces: dict[Request, Piece] = {}
        for request in requests:
            assert request.sequence is not None
            ahead = self._ahead[request]
            pieces[request] = Piece(request.sequence.length - len(ahead), request.tokens[-len(ahead) :], ahead)
        for number in range(self.drafts):
            active = [r for r in requests if wanted[r] > number]
            if not active:
                break
            sequences = [r.sequence for r in active if r.sequence is not None]
            logits = self.drafting.draft(sequences, [pieces[r] for r in active])
            states = self.drafting.states
            for row, request in enumerate(active):
                assert request.rng is not None
                proposal = request.sampling.propose(logits[row], request.rng)
                proposals[request].append(proposal)
                if number + 1 < wanted[request]:
                    done = pieces[request]
                    pieces[request] = Piece(done.first + len(done.ids), [proposal.token], states[row : row + 1].copy())
        return proposals

    def _verify(self, request: Request, proposals: list[Proposal], logits: Logits) -> int:
        """Take the tokens that the model gives, up to the first that was not proposed; returns how many were."""
        assert request.rng is not None
        self.rates.drafted_tokens += len(proposals)
        for kept, proposal in enumerate(proposals):
            token = request.sampling.verify(proposal, logits[kept], request.rng)
            agreed = token == proposal.token
            self.rates.decoded_tokens += 1
            self.rates.accepted_tokens += agreed
            self._take(request, token)
            if not agreed or request.done:
                return kept
        self.rates.decoded_tokens += 1
        self._accept(request, logits[len(proposals)])
        return len(proposals)

    def _end(self, request: Request) -> None:
        super()._end(request)
        self._ahead.pop(request, None)


def scheduler_of(engine: Steps, drafts: int, stream: Tell | None) -> Scheduler:
    """A scheduler that drafts so many tokens a step; 0: a plain one. The caller knows that the engine can."""
    return Speculation(cast(DraftingSteps, engine), drafts, stream) if drafts else Scheduler(engine, stream)
