"""How the sequences of a decode step are divided into micro-batches: even in number, then in cached tokens."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moec.runtime.distributed.overlapped import shares


@pytest.mark.parametrize("seed", range(8))
def test_load_is_near_the_best_even_division(seed: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = [int(n) for n in draw.lognormal(6, 1.2, size=draw.integers(2, 13)) + 1]
    found = shares(lengths, 2)
    assert sorted(i for mine in found for i in mine) == list(range(len(lengths)))
    assert len(found[0]) - len(found[1]) in (0, 1)
    loads = [sum(lengths[i] for i in mine) for mine in found]
    few = len(found[0])
    best = min(
        max(sum(lengths[i] for i in mine), sum(lengths) - sum(lengths[i] for i in mine))
        for mine in combinations(range(len(lengths)), few)
    )
    assert best <= max(loads) <= 7 / 6 * best


def test_long_sequences_are_spread() -> None:
    """In the order given, all long ones would fall into the first micro-batch."""
    assert shares([4096, 4096, 64, 64], 2) == [[0, 2], [1, 3]]
    assert shares([], 3) == [[], [], []]
    assert shares([5], 2) == [[0], []]
