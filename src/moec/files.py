"""Files of results: written whole or not at all."""

from __future__ import annotations

import os
import tempfile
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
    or an interruption leaves nothing behind.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode("utf-8"))
            else:
                content(file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise NotWritten(path=path, why=error.strerror or error) from None
        raise
