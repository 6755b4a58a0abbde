"""Writing an artifact: a folder that appears whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from moec.errors import InputError, MoecError, printable

FORMAT_VERSION = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class OutputExists(InputError):
    """An output path that is taken by something that is not an artifact."""

    template: ClassVar[str] = "{path}: exists and is not an artifact; choose another --out or remove it"


class WrongOutput(InputError):
    """An output path where no folder can be made."""

    template: ClassVar[str] = "{path}: cannot be written: {message}; choose another --out"


class WriteFailed(MoecError):
    """The artifact could not be written (a full disk, say)."""

    template: ClassVar[str] = "{path}: could not be written: {message}; nothing was left behind"


@contextmanager
def artifact_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, or is removed on any error.

    Folders above `out` are made, and removed again on an error. Raises OutputExists or WrongOutput before anything is
    written, WriteFailed for errors of the file system.
    """
    check_output(out)
    missing = [folder for folder in out.parents if not folder.exists()]
    work = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".moec-", dir=out.parent))
        yield work
        _replace(work, out)
    except BaseException as error:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise WriteFailed(path=out, message=error.strerror or str(error)) from None
        raise


def check_output(out: Path) -> None:
    """Raise OutputExists when `out` is taken, WrongOutput when no folder can be made there."""
    if os.path.lexists(out):
        if not _is_artifact(out) and not (out.is_dir() and not any(out.iterdir())):
            raise OutputExists(path=out)
        return
    above = next(folder for folder in out.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise WrongOutput(path=out, message=f"{printable(above)} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise WrongOutput(path=out, message=f"no permission to write in {printable(above)}")


def _is_artifact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and "format_version" in manifest


def _replace(work: Path, out: Path) -> None:
    """Put `work` in the place of `out`, in one step where the system can swap two folders."""
    work.chmod(0o755)
    if not os.path.lexists(out):
        work.rename(out)
    elif _swap(work, out):
        shutil.rmtree(work, ignore_errors=True)
    else:
        old = Path(tempfile.mkdtemp(prefix=".moec-", dir=out.parent))
        out.rename(old / "artifact")
        try:
            work.rename(out)
        except BaseException:
            (old / "artifact").rename(out)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two paths with Linux's renameat2; False where kernel, C library or file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(exchange)) == 0)


def library_name(stage: int) -> str:
    """The kernel library of a pipeline stage, in `kernels/`."""
    return "kernels.so" if stage == 0 else f"kernels-{stage}.so"


def source_name(stage: int) -> str:
    """The folder of that library's source, in `kernels/`."""
    return "source" if stage == 0 else f"source-{stage}"


def copy_tokenizer(source: Path | None, work: Path) -> None:
    """Take along the tokenizer of a model folder, when it has one."""
    found = [source / n for n in TOKENIZER_FILES if (source / n).is_file()] if source else []
    if found:
        (work / "tokenizer").mkdir()
        for file in found:
            shutil.copyfile(file, work / "tokenizer" / file.name)


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys, so that equal content gives equal bytes."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_manifest(work: Path, facts: dict[str, Any], progress: Callable[[str], None] | None = None) -> None:
    """manifest.json: the facts, the format version, the SHA-256 of every other file, and one of the manifest itself.

    That one, `checksum`, is taken over the rest as JSON with sorted keys, no spaces and ASCII only.
    """
    files = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file()):
        name = path.relative_to(work).as_posix()
        if progress is not None:
            progress(name)
        files[name] = sha256(path)
    manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    checksum = hashlib.sha256(canonical.encode()).hexdigest()
    write_json(work / "manifest.json", {**manifest, "checksum": checksum})


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
