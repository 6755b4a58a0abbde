"""`moec export`: an artifact in a format that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import typer

from moec.errors import InputError, near

FORMATS = ("onnx", "placement")


class UnknownFormat(InputError):
    """A format that cannot be written."""

    template: ClassVar[str] = "unknown format {name!r}{hint}"


class NoOnnx(InputError):
    """The package that writes ONNX is not installed."""

    template: ClassVar[str] = "exporting ONNX needs the package onnx: pip install 'moec[onnx]'"


class OnlyOfPlacements(InputError):
    """--sglang with another format."""

    template: ClassVar[str] = "--sglang is a form of placements: moec export ARTIFACT placement --sglang"


class NoPlacement(InputError):
    """An artifact whose experts lie on one rank."""

    template: ClassVar[str] = "{path}: its experts are not spread over ranks (--ep): there is no placement to export"


_EXAMPLES = """\
moec export tiny.moec onnx --out tiny.onnx
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export", epilog=_EXAMPLES)(export_artifact)


def export_artifact(
    artifact: Annotated[str, typer.Argument(help="Folder that `moec compile` wrote.")],
    form: Annotated[str, typer.Argument(metavar="FORMAT", help="onnx, or placement.")],
    out: Annotated[Path, typer.Option(help="Folder to write; of a placement the file, .json or .npz.")],
    sglang: Annotated[
        bool, typer.Option("--sglang", help="A placement as SGLang's --init-expert-location reads it.")
    ] = False,
) -> None:
    """Write an artifact as ONNX models, or its placement.

    A model a phase, with the weights; of a placement the expert of every slot.
    """
    if form not in FORMATS:
        raise UnknownFormat(name=form, hint=near(form, list(FORMATS)))
    if sglang and form != "placement":
        raise OnlyOfPlacements()
    if form == "placement":
        _export_placement(artifact, out, sglang)
        return
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
    module = parse_module(file.read_text(encoding="utf-8"), str(file))
    if module.functions.pop("draft", None) is not None:
        remove_unused(module)
        note("the multi-token-prediction module is left out: prefill and decode are written")
    with artifact_folder(out) as work, Progress("writing") as progress:
        export(module, Weights(opened.weights), work, progress)
    note(f"wrote {out}: prefill.onnx, decode.onnx, weights.bin")


def _export_placement(artifact: str, out: Path, sglang: bool) -> None:
    """Write the placement that the artifact was compiled with, or the even one that it runs by without."""
    from moec.cli.output import note
    from moec.ir import parse_module
    from moec.passes.placement import formats
    from moec.passes.sharding.placed import placement_of
    from moec.runtime.artifact import read_program

    path, text = read_program(artifact)
    found = placement_of(parse_module(text, str(path)))
    if found is None:
        raise NoPlacement(path=artifact)
    placement, dense_layers = found
    if sglang:
        if not placement.has_even_shares:
            note("SGLang shares tokens evenly among replicas; the artifact's shares do not reach it")
        formats.write_sglang(placement, out, dense_layers=dense_layers)
    else:
        formats.write_placement(placement, out)
    note(f"wrote {out}: {placement.layers} layers, {placement.experts} experts in {placement.slots} slots")
