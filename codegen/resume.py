"""Packing that goes on where it was interrupted: finished parts of weight files, in a folder beside the output.

The folder `.NAME.packing` holds the weight files as they grow, and `state.json`: a key of everything that their bytes
depend on, and how many index points of each file are on the disk for good. Whoever comes with another key starts anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from moec.errors import printable

EVERY = 256 << 20
"""Bytes of weights between two entries of the state: what an interruption costs at most."""


class Journal:
    """The points of one weight file that are packed; `record` them once their bytes are written."""

    def __init__(self, partial: Partial, name: str) -> None:
        self.partial, self.name = partial, name
        self.path = partial.folder / name
        self._bytes = 0

    def begin(self, size: int) -> int:
        """Points that are written already, of a file that is `size` bytes in the end."""
        whole = self.path.exists() and self.path.stat().st_size == size
        return self.partial.points.get(self.name, 0) if whole else 0

    def record(self, file: IO[bytes], points: int, nbytes: int) -> None:
        """`points` are written, the last of them with `nbytes`; every now and then this is made to last."""
        self._bytes += nbytes
        if self._bytes >= EVERY:
            self._keep(file, points)

    def finish(self, file: IO[bytes], points: int) -> None:
        """The whole file is written. One too small for an entry is not worth keeping."""
        if self.partial.points or self._bytes >= EVERY:
            self._keep(file, points)

    def _keep(self, file: IO[bytes], points: int) -> None:
        file.flush()
        os.fsync(file.fileno())
        self._bytes = 0
        self.partial.note(self.name, points)


class Partial:
    """The folder of files that are being packed, and what of them is finished."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.points: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the disk of what is packed."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())

    def journal(self, name: str) -> Journal:
        """The journal of the weight file `name`."""
        return Journal(self, name)

    def note(self, name: str, points: int) -> None:
        """Write the state with so many points of a file, in one step."""
        self.points[name] = points
        new = self.folder / "state.new"
        new.write_text(json.dumps({"key": self.key, "points": self.points}), encoding="utf-8")
        new.replace(self.folder / "state.json")

    def read(self) -> str:
        """Take up what an earlier run left; returns what is to be said of it."""
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            key, points = state["key"], {str(k): int(v) for k, v in state["points"].items()}
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._empty()
            return f"packing starts anew: the state in {printable(self.folder)} cannot be read"
        if key != self.key:
            self._empty()
            return f"packing starts anew: {printable(self.folder)} was left by a run of other options or weights"
        self.points = points
        return f"packing goes on where it was interrupted ({printable(self.folder)})"

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()


@contextmanager
def resumable(out: Path, key: str, say: Callable[[str], None]) -> Iterator[Partial | None]:
    """The partial state for the artifact `out`; None while another process packs there.

    Gone when the block ends, whether well or by an error. An interruption (or the end of the process) leaves it once
    something of it would last. The folder of `out` must exist. Raises OSError.
    """
    folder = out.parent / f".{out.name}.packing"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        partial = Partial(folder, key)
        if found := partial.read():
            say(found)
        try:
            yield partial
        except (KeyboardInterrupt, SystemExit):
            if partial.points:
                say(f"interrupted: what is packed stays in {printable(folder)}, the same command goes on from there")
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def place(source: Path, target: Path) -> None:
    """Give the finished file a second name, so that it is there again after an interruption; or move it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.move(source, target)


def key_of(module: Any, origin: Any) -> str:
    """A digest of all that packed bytes depend on: the weights' programs, where tensors come from, and this code."""
    from moec.ir import Module, print_module

    only = Module(module.name, dict(module.attrs), module.weights, {})
    digest = hashlib.sha256(print_module(only, locations=False).encode())
    digest.update(json.dumps(origin, sort_keys=True).encode())
    root = Path(__file__).resolve().parent.parent
    files = ("codegen/pack.py", "codegen/storage.py", "frontend/checkpoint.py", "frontend/mxfp4.py")
    for source in [*sorted((root / "ir").rglob("*.py")), *(root / name for name in files)]:
        digest.update(source.read_bytes())
    return digest.hexdigest()
