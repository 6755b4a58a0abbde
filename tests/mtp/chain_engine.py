"""A stand-in for an engine: logits are a function of all tokens that its pages hold, and so are its states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moec.runtime.cache import PagePool
from moec.runtime.cache import Sequence as Cached
from moec.runtime.engine import Ids, Logits, Piece, States

EMPTY = -1


class ChainEngine:
    """Paged like the real ones: what a call attends to is what earlier calls left in the pages.

    The draft knows the model's choice with probability `skill`, a function of the tokens, and else prefers another. It
    checks that it gets the states of the very positions that it continues from.
    """

    VOCAB = 11
    PAGE = 4

    def __init__(self, skill: float, vocab: int = VOCAB, batch: int = 3) -> None:
        self.skill, self.vocab, self.batch = skill, vocab, batch
        self.chunk = self.rows = 8
        self.drafts = 4
        self.pool = PagePool(batch * 20, self.PAGE, 80)
        self.tokens = np.full((self.pool.pages, self.PAGE), EMPTY)
        self.seen = np.zeros((self.pool.pages, self.PAGE))
        """What the module has in its part of the cache: the state that each position was given with."""
        self.states: States = np.zeros((0, 1), dtype=np.float32)
        self.weights: Any = None
        self.threads = 1

    def use_threads(self) -> None:
        """Nothing to set up."""

    def logits_after(self, tokens: Sequence[int]) -> Logits:
        """f32[V] after a list of tokens."""
        return _rng(0, tokens).standard_normal(self.vocab).astype(np.float32)

    def prefill(self, sequence: Cached, tokens: Ids, last_only: bool = True) -> Logits:
        return self.verify([sequence], [tokens.tolist()])[-1:]

    def decode(self, sequences: Sequence[Cached], tokens: Iterable[int]) -> Logits:
        return self.verify(sequences, [[t] for t in tokens])

    def verify(self, sequences: Sequence[Cached], tokens: Sequence[Sequence[int]]) -> Logits:
        logits, states = [], []
        for sequence, few in zip(sequences, tokens, strict=True):
            self.pool.extend(sequence, len(few))
            for token in few:
                self.tokens[self._at(sequence, sequence.length)] = token
                sequence.length += 1
                prefix = self._prefix(sequence, sequence.length)
                logits.append(self.logits_after(prefix))
                states.append([_state(prefix)])
        self.states = np.array(states, dtype=np.float32)
        return np.array(logits)

    def draft(self, sequences: Sequence[Cached], pieces: Sequence[Piece], last_only: bool = True) -> Logits:
        logits, states = [], []
        for sequence, piece in zip(sequences, pieces, strict=True):
            self.pool.extend(sequence, max(0, piece.first + len(piece.ids) - sequence.length))
            for i, token in enumerate(piece.ids):
                position, state = piece.first + i, float(piece.hidden[i, 0])
                prefix = self._prefix(sequence, min(position + 1, sequence.length))
                if position < sequence.length:
                    assert state == np.float32(_state(prefix)), "a state of another position"
                    assert position + 1 >= sequence.length or token == self.tokens[self._at(sequence, position + 1)]
                self.seen[self._at(sequence, position)] = state
                for earlier in range(min(position, sequence.length)):
                    known = self._prefix(sequence, earlier + 1)
                    assert self.seen[self._at(sequence, earlier)] == np.float32(_state(known)), "a stale position"
            drafted = [] if position < sequence.length else self._drafted[id(sequence)]
            text = [*prefix, *drafted, int(piece.ids[-1])]
            self._note(sequence, [*drafted, int(piece.ids[-1])])
            wanted = self.logits_after(text)
            knows = _rng(1, text).random() < self.skill
            logits.append(wanted if knows else -wanted)
            states.append([0.5])
        self.states = np.array(states, dtype=np.float32)
        return np.array(logits)

    def _note(self, sequence: Cached, tokens: list[int]) -> None:
        self._drafted = {**getattr(self, "_drafted", {}), id(sequence): tokens}

    def _at(self, sequence: Cached, position: int) -> tuple[int, int]:
        return int(sequence.table[position // self.PAGE]), position % self.PAGE

    def _prefix(self, sequence: Cached, length: int) -> list[int]:
        return [int(self.tokens[self._at(sequence, p)]) for p in range(length)]


def _state(prefix: Sequence[int]) -> float:
    return float(_rng(2, prefix).random())


def _rng(kind: int, tokens: Sequence[int]) -> np.random.Generator:
    return np.random.default_rng((kind, *(int(t) + 1 for t in tokens)))
