"""Whether this process is one of several ranks that torchrun started. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from moec.errors import InputError

if TYPE_CHECKING:
    from moec.runtime.model import Model

TIMEOUT = 30.0
"""Seconds after which a rank that gives no sign of life, or does not move while others wait, ends the run."""


class WrongEnvironment(InputError):
    """Variables that torchrun sets, set by somebody else."""

    template: ClassVar[str] = "the environment variable {name} is {value!r}, not {wanted}: start ranks with torchrun"
    found_by_all: ClassVar[bool] = False


def launched() -> bool:
    """Whether torchrun started this process as one of several; raises WrongEnvironment."""
    if "RANK" not in os.environ:
        return False
    size = _number("WORLD_SIZE", 1, None, "1")
    return size > 1 and _number("RANK", 0, size - 1) >= 0


def _number(name: str, least: int, most: int | None, default: str | None = None) -> int:
    """A variable of the environment as a whole number in a range."""
    value = os.environ.get(name, default)
    if value is not None and value.isdecimal() and least <= int(value) and (most is None or int(value) <= most):
        return int(value)
    wanted = f"a whole number from {least} on" if most is None else f"a whole number from {least} to {most}"
    raise WrongEnvironment(name=name, value=value, wanted=wanted)


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
