"""Shared by all tests: kernels are cached in a folder of the session, threads are few, CI draws the same examples."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
if "MOEC_CACHE_DIR" not in os.environ:  # the workers of a run inherit the folder of the process that made it
    os.environ["MOEC_CACHE_DIR"] = tempfile.mkdtemp(prefix="moec-test-cache-")
    atexit.register(shutil.rmtree, os.environ["MOEC_CACHE_DIR"], ignore_errors=True)

# A red run in CI must be reproducible; at a desk each run looks somewhere else. Shared machines stall: no deadlines.
settings.register_profile("desk", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")

SEED = int(os.environ.get("MOEC_SEED") or random.SystemRandom().randrange(10**6))
"""What configurations of models are drawn from: a new one each run, or the one in MOEC_SEED."""


def pytest_report_header() -> str:
    return f"families are drawn from MOEC_SEED={SEED}"


@pytest.fixture
def seed() -> int:
    """The seed of this run; printed, so that a failure shows it."""
    print(f"MOEC_SEED={SEED}")
    return SEED
