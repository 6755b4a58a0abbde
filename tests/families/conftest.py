"""The seed that configurations are drawn from: a new one each run, printed, or the one in MOEC_SEED."""

from __future__ import annotations

import os
import random

import pytest

SEED = int(os.environ.get("MOEC_SEED") or random.SystemRandom().randrange(10**6))


def pytest_report_header() -> str:
    return f"families are drawn from MOEC_SEED={SEED}"


@pytest.fixture
def seed() -> int:
    """The seed of this run; printed, so that a failure shows it."""
    print(f"MOEC_SEED={SEED}")
    return SEED
