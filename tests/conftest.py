"""Shared by all tests: kernels are cached in a folder of the session, threads are few."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MOEC_CACHE_DIR", tempfile.mkdtemp(prefix="moec-test-cache-"))
