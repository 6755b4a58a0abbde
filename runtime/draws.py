"""Random numbers of a sequence by counting: the n-th is a function of its key and n, the same on every device.

Philox 4x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as Triton has it.
What a sequence draws does not depend on the sequences beside it, nor on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85


def philox(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words from a 64-bit key and a 128-bit counter."""
    a, b, c, d = counter
    low, high = key & WORD, key >> 32
    for _ in range(10):
        first, second = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = (second >> 32) ^ b ^ low, second & WORD, (first >> 32) ^ d ^ high, first & WORD
        low, high = (low + WEYL[0]) & WORD, (high + WEYL[1]) & WORD
    return a, b, c, d


@dataclass
class Draws:
    """The random numbers of one sequence; `count` were taken."""

    key: int
    count: int = 0

    @staticmethod
    def of(seed: int, sequence: int) -> Draws:
        """Those of a sequence of a run with a seed."""
        return Draws(int(np.random.SeedSequence((seed, sequence)).generate_state(1, np.uint64)[0]))

    def random(self) -> float:
        """The next one, uniform in [0, 1), a multiple of 2**-24."""
        word, *_ = philox(self.key, (self.count, 0, 0, 0))
        self.count += 1
        return (word >> 8) * 2.0**-24
