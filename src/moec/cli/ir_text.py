"""IR text as commands are given it: a file, an artifact, ONNX files or stdin; and the options of `moec ir`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from moec.errors import InputError

if TYPE_CHECKING:
    from moec.ir import Module


class UnreadableFile(InputError):
    """A file that cannot be read as text."""

    template: ClassVar[str] = "{file}: {message}"


def read_text(file: str) -> str:
    """The text of a file, of an artifact's program, or of stdin for `-`; raises UnreadableFile."""
    try:
        if file == "-":
            return sys.stdin.read()
        path = Path(file)
        return (path / "program.ir" if path.is_dir() else path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UnreadableFile(file=file, message="is not text") from None
    except OSError as error:
        raise UnreadableFile(file=file, message=error.strerror or str(error)) from None


def read_module(file: str) -> Module:
    """The module of a file; raises UnreadableFile or ParseError."""
    from moec.ir import parse_module

    if file.endswith(".onnx"):
        from moec.frontend.onnx_file import read_exported

        return read_exported([Path(f) for f in file.split(",")])
    return parse_module(read_text(file), file)


File = Annotated[
    str,
    typer.Argument(
        help="IR text, an artifact folder, ONNX files of `moec export` (with commas between), or - for stdin."
    ),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Sequences in a batch.", show_default="1")]
ContextLength = Annotated[int | None, typer.Option(min=1, help="Tokens of context.", show_default="4096")]
Chunk = Annotated[int | None, typer.Option(min=1, help="Tokens of a prefill chunk.", show_default="256")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
