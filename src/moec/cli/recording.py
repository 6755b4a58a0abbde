"""`--record-loads`: the experts that a command's tokens went to, in a file for `moec place`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moec.cli.output import note
from moec.errors import InputError

if TYPE_CHECKING:
    from moec.runtime import Model


class NoSuchPlace(InputError):
    """A file that could not be written once the work is done."""

    template: ClassVar[str] = "--record-loads {path}: {why}"


def check_place(path: Path | None) -> None:
    """Refuse before the work begins what could not be written after it."""
    if path is None:
        return
    if path.suffix != ".npz":
        raise NoSuchPlace(path=path, why="the file is an npz, name it so")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise NoSuchPlace(path=path, why=f"{path.parent} is no folder that can be written to")


@contextmanager
def recorded(model: Model, path: Path | None) -> Iterator[None]:
    """Record what the model does inside and write it to `path`; of several ranks the first one writes for all."""
    if path is None:
        yield
        return
    from moec.runtime.launch import first

    model.record_loads()
    yield
    loads = model.recorded_loads()
    if first():
        loads.save(path)
        chosen = loads.loads.sum(axis=1)
        note(f"wrote {path}: {len(loads.layers)} layers, {int(chosen.max())} choices of experts a layer")
