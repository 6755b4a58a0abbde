"""What a call is given: tokens, positions and pages of some sequences, filled up to a size that has a graph."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moec.runtime.cache import Sequence
from moec.runtime.engine import Ids

Numbers = NDArray[np.int32]


@dataclass(frozen=True)
class Inputs:
    """The arrays of a call by name, and its sizes; the first `count` tokens and `wanted` rows are somebody's.

    `each`: tokens of every sequence.
    """

    arrays: dict[str, Numbers]
    sequences: int
    each: int
    rows: int
    count: int
    wanted: int

    @property
    def tokens(self) -> int:
        """All tokens of the call, the last of which may only fill it up."""
        return self.sequences * self.each

    @property
    def longest(self) -> int:
        """Most cached positions of a sequence, with this call's."""
        return int(self.arrays["lengths"].max())


def inputs_of(
    sequences: List[Sequence], firsts: List[int], tokens: List[List[int] | Ids], last_only: bool, spare: int,
    width: int, bucket: Callable[[int], int],
) -> Inputs:  # fmt: skip
    """Some tokens of each sequence, from position firsts[b] on; logits of all or of each sequence's last.

    Kernels take equally many tokens of every sequence: where they differ, each token counts as a sequence of its own,
    which reads the same pages and sees no later position. Sequences that are filled in, up to `bucket` of their number,
    have their rows in the page `spare`, which nobody reads; `width` pages stand in a row of the page table.
    """
    counts = [len(few) for few in tokens]
    total, even = sum(counts), len(set(counts)) <= 1
    each = counts[0] if even and counts else 1
    position = [f + i for f, n in zip(firsts, counts, strict=True) for i in range(n)]
    owner = np.repeat(np.arange(len(sequences)), counts)
    last = np.cumsum(counts) - 1 if counts else np.zeros(0, dtype=np.int64)
    held = len(sequences) if even else total
    size = bucket(held)
    pages = np.full((size, width), spare, dtype=np.int32)
    for row in range(held):
        pages[row] = sequences[row if even else owner[row]].table
    filled = np.tile(np.arange(each), size)
    filled[:total] = position
    ids = np.zeros(size * each, dtype=np.int32)
    ids[:total] = np.concatenate([np.asarray(few) for few in tokens]) if total else 0
    lengths = filled[each - 1 :: each] + 1
    wanted = len(sequences) if last_only else total
    rows = np.zeros(bucket(wanted) if last_only else size * each, dtype=np.int32)
    rows[:wanted] = last if last_only else np.arange(total)
    arrays = {
        "ids": ids,
        "seq": np.repeat(np.arange(size), each),
        "pos": filled,
        "pages": pages.ravel(),
        "lengths": lengths,
        "starts": np.concatenate(([0], np.cumsum(lengths))),
        "q_starts": np.arange(size + 1) * each,
        "rows": rows,
    }
    return Inputs(arrays, size, each, len(rows), total, wanted)
