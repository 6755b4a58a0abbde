"""Compiled programs in the user's cache folder, addressed by content, safe with several processes at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moec.errors import printable

SUMS = "SHA256SUMS"
"""Hashes of an entry's files, written last: an entry without them, or with other files, is built again."""


@dataclass(frozen=True)
class Entry:
    """The folder of a compiled program, whether it was there before, and what the user should know."""

    folder: Path
    cached: bool
    note: str


def cache_folder() -> Path:
    """`$MOEC_CACHE_DIR`, or `moec` in the user's cache folder."""
    given = os.environ.get("MOEC_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "moec"


def find_or_build(key: str, build: Callable[[Path], None]) -> Entry:
    """The entry of a key; `build` fills a folder when there is none, or a damaged one.

    Of two processes that build at once, the first to finish is kept. Where the cache cannot be written, the entry
    stands in a temporary folder that lives as long as this process. Raises what `build` raises, leaving nothing behind.
    """
    found = cache_folder() / "cpu" / key
    if is_sound(found):
        return Entry(found, True, "kernels from the cache")
    work, note = _work_folder(found.parent)
    try:
        build(work)
        files = sorted(path for path in work.rglob("*") if path.is_file())
        lines = [f"{_sha256(file)}  {file.relative_to(work)}\n" for file in files]
        (work / SUMS).write_text("".join(lines), encoding="utf-8")
        folder = work.parent / key
        _keep(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Entry(folder, False, note)


def is_sound(folder: Path) -> bool:
    """Whether an entry is there and its files are as they were written."""
    try:
        sums = [line.split("  ", 1) for line in (folder / SUMS).read_text(encoding="utf-8").splitlines()]
        return bool(sums) and all(_sha256(folder / name) == digest for digest, name in sums)
    except (OSError, ValueError):
        return False


def _work_folder(root: Path) -> tuple[Path, str]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".build-", dir=root)), "kernels compiled"
    except OSError as error:
        why = f"the cache {printable(root)} cannot be written ({error.strerror}); set MOEC_CACHE_DIR"
        note = f"kernels compiled, not kept: {why}"
        return Path(tempfile.mkdtemp(prefix=".build-", dir=_temporary().name)), note


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="moec-kernels-")


def _keep(work: Path, folder: Path) -> None:
    """Move a finished entry to its place, unless another process put a sound one there."""
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_sound(folder):
            shutil.rmtree(folder, ignore_errors=True)
            work.rename(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
