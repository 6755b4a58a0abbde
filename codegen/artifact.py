"""Writing an artifact: a folder that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from moec.errors import InputError, MoecError

FORMAT_VERSION = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class OutputExists(InputError):
    """An output path that is taken by something that is not an artifact."""

    template: ClassVar[str] = "{path}: exists and is not an artifact; choose another --out or remove it"


class WriteFailed(MoecError):
    """The artifact could not be written (a full disk, say)."""

    template: ClassVar[str] = "{path}: could not be written: {message}; nothing was left behind"


@contextmanager
def artifact_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, or is removed on any error.

    Raises OutputExists before anything is written, WriteFailed for errors of the file system.
    """
    if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExists(path=out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise WriteFailed(path=out, message=error.strerror or str(error)) from None
    try:
        yield work
        _replace(work, out)
    except OSError as error:
        raise WriteFailed(path=out, message=error.strerror or str(error)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(work: Path, out: Path) -> None:
    work.chmod(0o755)
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
        out.rename(old / "artifact")
        work.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        work.rename(out)


def copy_tokenizer(source: Path | None, work: Path) -> None:
    """Take along the tokenizer of a model folder, when it has one."""
    found = [source / n for n in TOKENIZER_FILES if (source / n).is_file()] if source else []
    if found:
        (work / "tokenizer").mkdir()
        for file in found:
            shutil.copyfile(file, work / "tokenizer" / file.name)


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys, so that equal content gives equal bytes."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_manifest(work: Path, facts: dict[str, Any], progress: Callable[[str], None] | None = None) -> None:
    """manifest.json: the facts, the format version, and the SHA-256 of every other file."""
    files = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file()):
        name = path.relative_to(work).as_posix()
        if progress is not None:
            progress(name)
        files[name] = sha256(path)
    write_json(work / "manifest.json", {"format_version": FORMAT_VERSION, **facts, "files": files})


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
