"""`moec export`: an artifact in a format that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import typer

from moec.errors import InputError, near

FORMATS = ("onnx",)


class UnknownFormat(InputError):
    """A format that cannot be written."""

    template: ClassVar[str] = "unknown format {name!r}{hint}"


class NoOnnx(InputError):
    """The package that writes ONNX is not installed."""

    template: ClassVar[str] = "exporting ONNX needs the package onnx: pip install 'moec[onnx]'"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export_artifact)


def export_artifact(
    artifact: Annotated[str, typer.Argument(help="Folder that `moec compile` wrote.")],
    form: Annotated[str, typer.Argument(metavar="FORMAT", help="onnx.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Write an artifact's program and weights as ONNX models, one a phase."""
    if form not in FORMATS:
        raise UnknownFormat(name=form, hint=near(form, list(FORMATS)))
    from moec.cli.output import Progress, note

    try:
        from moec.codegen.onnx.export import export
    except ImportError:
        raise NoOnnx() from None
    from moec.codegen.artifact import artifact_folder
    from moec.ir import parse_module
    from moec.ir.rewrite import remove_unused
    from moec.runtime.artifact import open_artifact
    from moec.runtime.weights import Weights

    opened = open_artifact(artifact)
    file = opened.path / "program.ir"
    module = parse_module(file.read_text(), str(file))
    if module.functions.pop("draft", None) is not None:
        remove_unused(module)
        note("the multi-token-prediction module is left out: prefill and decode are written")
    with artifact_folder(out) as work, Progress("writing") as progress:
        export(module, Weights(opened.weights), work, progress)
    note(f"wrote {out}: prefill.onnx, decode.onnx, weights.bin")
