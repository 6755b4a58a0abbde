"""Files of results: written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

from moec.errors import MoecError


class NotWritten(MoecError):
    """A file that cannot be written: the disk is full, or its folder is missing or not ours to write to."""

    template: ClassVar[str] = "cannot write {path}: {why}"


def write_whole(path: Path, content: str | Callable[[IO[bytes]], Any]) -> None:
    """Write text, in UTF-8, or what a function writes into a binary file; raises NotWritten.

    A file beside `path` takes its name once it is complete: readers see the old content or the new one, and an error
    or an interruption leaves nothing behind. A link is followed. What stands there and is neither a file nor a folder
    (a pipe, a device such as /dev/null) is written to: another file in its place would destroy it.
    """
    temporary: Path | None = None
    try:
        target = Path(os.path.realpath(path))
        if target.is_symlink():  # only a circle of links ends at one
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if target.exists() and not target.is_file() and not target.is_dir():
            with target.open("wb") as file:
                _write(file, content)
            return
        beside = target.parent / f".moec-{secrets.token_hex(8)}"
        with beside.open("xb") as file:  # with the rights that a new file gets here, as the user's umask says
            temporary = beside
            _write(file, content)
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise NotWritten(path=path, why=error.strerror or error) from None
        raise


def _write(file: IO[bytes], content: str | Callable[[IO[bytes]], Any]) -> None:
    if isinstance(content, str):
        file.write(content.encode("utf-8"))
    else:
        content(file)
