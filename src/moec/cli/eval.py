"""`moec eval`: perplexity of an artifact on a text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moec.cli.arguments import Threads
from moec.errors import InputError


class UnreadableText(InputError):
    """The text file cannot be read."""

    template = "{file}: {why}"


_EXAMPLES = """\
moec eval tiny.moec --text heldout.txt
moec eval tiny.moec --text heldout.txt --record-loads loads.npz
"""


def register(app: typer.Typer) -> None:
    """Add `moec eval`."""
    app.command("eval", epilog=_EXAMPLES)(evaluate)


def evaluate(
    artifact: Annotated[str, typer.Argument(help="Folder that `moec compile` wrote.")],
    text: Annotated[Path, typer.Option(help="File with the text, UTF-8.")],
    stride: Annotated[
        int | None, typer.Option(help="Tokens between the windows.", show_default="half the compiled context")
    ] = None,
    threads: Threads = None,
    record_loads: Annotated[
        Path | None, typer.Option(metavar="OUT.npz", help="Count which experts tokens go to, for `moec place`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity in sliding windows of the compiled context."""
    from moec.cli.recording import check_place, recorded
    from moec.runtime.launch import TIMEOUT, first, loaded
    from moec.runtime.perplexity import score_text

    content = read_text(text)
    check_place(record_loads)
    progress = _progress if first() and sys.stderr.isatty() else _quiet
    with loaded(artifact, False, threads, TIMEOUT) as model, recorded(model, record_loads):
        score = score_text(model, content, stride, progress)
    if not first():
        return
    if as_json:
        fields = {
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "loss": score.loss,
            "tokens": score.tokens,
            "bytes": score.bytes,
            "window": score.window,
            "stride": score.stride,
            "artifact": artifact,
            "text": str(text),
        }
        print(json.dumps(fields))
        return
    print(f"perplexity {score.perplexity:.4f} a token, {score.bits_per_byte:.4f} bits a byte")
    print(f"{score.tokens:,} tokens, {score.bytes:,} bytes; windows of {score.window} tokens, stride {score.stride}")


def read_text(file: Path) -> str:
    """The content of a UTF-8 file; raises UnreadableText."""
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise UnreadableText(file=file, why=error.strerror or "cannot be read") from None
    except UnicodeDecodeError as error:
        raise UnreadableText(file=file, why=f"is not UTF-8 text (byte {error.start})") from None


def _quiet(done: int, total: int) -> None:
    """No progress: stderr is no terminal."""


def _progress(done: int, total: int) -> None:
    print(f"\r{done:,} of {total:,} tokens", end="\n" if done == total else "", file=sys.stderr, flush=True)
