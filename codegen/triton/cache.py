"""Compiled kernels kept on disk by content, safe with several processes at once.

An entry is a folder named by the hash of all that decides the result. It is written beside its place and renamed, so a
reader sees a whole entry or none; of two writers of one entry the second finds the place taken and drops its copy. An
entry whose files do not match their hashes is removed and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

FACTS = "facts.json"


def default_folder() -> Path:
    """$MOEC_CACHE_DIR, or the user's cache folder, with the part that belongs to GPU kernels."""
    chosen = os.environ.get("MOEC_CACHE_DIR")
    if chosen:
        return Path(chosen) / "gpu-kernels"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "moec" / "gpu-kernels"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def place(folder: Path, key: str) -> Path:
    return folder / key[:2] / key


def load(folder: Path, key: str) -> tuple[dict[str, Any], dict[str, bytes]] | None:
    """Facts and files of an entry; None when there is none, or a damaged one, which is removed."""
    entry = place(folder, key)
    try:
        facts: dict[str, Any] = json.loads((entry / FACTS).read_text(encoding="utf-8"))
        files = {name: (entry / name).read_bytes() for name in facts["sha256"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        files, facts = {}, {"sha256": {"": ""}}
    if {name: digest(data) for name, data in files.items()} != facts["sha256"]:
        shutil.rmtree(entry, ignore_errors=True)
        return None
    return facts, files


def store(folder: Path, key: str, facts: dict[str, Any], files: dict[str, bytes]) -> None:
    """Writes an entry whole, or leaves the one that another process has written meanwhile."""
    entry = place(folder, key)
    entry.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
    try:
        for name, data in files.items():
            (beside / name).write_bytes(data)
        hashes = {name: digest(data) for name, data in files.items()}
        (beside / FACTS).write_text(json.dumps({**facts, "sha256": hashes}, sort_keys=True), encoding="utf-8")
        try:
            os.replace(beside, entry)
        except OSError:
            if not (entry / FACTS).exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
