"""Pages of the key-value cache: which sequence owns which page of 64 tokens (after vLLM's PagedAttention,
arXiv 2309.06180, sec. 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import CacheFull


@dataclass(slots=True, eq=False)
class Sequence:
    """A live sequence: `length` tokens are in the cache; `table` int32[N] lists its pages, `held` of them valid."""

    table: NDArray[np.int32]
    length: int = 0
    held: int = 0


class PagePool:
    """Hands out the pages of one cache. A page belongs to one sequence at a time."""

    def __init__(self, pages: int, page_size: int, context: int) -> None:
        self.pages = pages
        self.page_size = page_size
        self.context = context
        self.table_width = -(-context // page_size)
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def open(self) -> Sequence:
        """A new sequence without tokens. Entries of its table that are not in use name page 0, a valid address."""
        return Sequence(np.zeros(self.table_width, dtype=np.int32))

    def extend(self, sequence: Sequence, tokens: int) -> None:
        """Make room for `tokens` more tokens; raises CacheFull and changes nothing when there are too few pages.

        The caller keeps `length + tokens` within the context.
        """
        needed = -(-(sequence.length + tokens) // self.page_size) - sequence.held
        if needed > len(self._free):
            raise CacheFull(pages=self.pages, page_size=self.page_size)
        for _ in range(needed):
            sequence.table[sequence.held] = self._free.pop()
            sequence.held += 1

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Take back the tokens from `length` on, and the pages that held nothing else."""
        kept = -(-length // self.page_size)
        if kept >= sequence.held:
            sequence.length = length
            return
        self._free.extend(reversed(sequence.table[kept : sequence.held].tolist()))
        sequence.table[kept : sequence.held] = 0
        sequence.length, sequence.held = length, kept

    def close(self, sequence: Sequence) -> None:
        """Give the pages of `sequence` back; it is empty afterwards."""
        self.truncate(sequence, 0)
