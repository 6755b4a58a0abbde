"""`--record-loads`: the experts that a command's tokens went to, in a file for `moec place`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moec.cli.output import NoSuchPlace, check_file, note

if TYPE_CHECKING:
    from moec.runtime import Model


def check_place(path: Path | None) -> None:
    """Refuse before the work begins what could not be written after it."""
    if path is None:
        return
    if path.suffix != ".npz":
        raise NoSuchPlace(option="--record-loads", path=path, why="the file is an npz, name it so")
    check_file("--record-loads", path)


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
