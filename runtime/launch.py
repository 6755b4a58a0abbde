"""Whether this process is one of several ranks that torchrun started. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.runtime.model import Model

TIMEOUT = 30.0
"""Seconds after which a rank that gives no sign of life, or does not move while others wait, ends the run."""


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def first() -> bool:
    """Whether this process is the one that prints."""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def loaded(path: str, check: bool, threads: int | None, timeout: float, micro_batches: int = 1) -> Iterator[Model]:
    """The model of an artifact: in one process, or this rank's part of it. Errors of one rank end all.

    `micro_batches`: as of `load_distributed`; without effect in one process.
    """
    if not launched():
        from moec.runtime.model import load

        yield load(path, check=check, threads=threads)
        return
    from moec.runtime.distributed.model import load_distributed

    model = load_distributed(path, check, threads, timeout, micro_batches)
    with model.monitor.errors():
        yield model
    model.close()
