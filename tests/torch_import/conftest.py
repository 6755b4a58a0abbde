"""The seed of the families' tests."""

from __future__ import annotations

import os
import random

import pytest

SEED = int(os.environ.get("MOEC_SEED") or random.SystemRandom().randrange(10**6))


@pytest.fixture
def seed() -> int:
    """The seed of this run; printed, so that a failure shows it."""
    print(f"MOEC_SEED={SEED}")
    return SEED
