"""`moec quantise`: a checkpoint to one in FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_EXAMPLES = """\
moec quantise path/to/bf16-folder --out fp8-folder
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("quantise", epilog=_EXAMPLES)(quantise)


def quantise(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder with weights in 16 or 32 bits.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    scale: Annotated[str, typer.Option(help="Format of the scales: f32 or ue8m0 (powers of two).")] = "f32",
    block: Annotated[int, typer.Option(min=1, max=1 << 16, help="Rows and columns that share a scale.")] = 128,
) -> None:
    """Write a checkpoint in FP8 with block scales.

    Matrices in E4M3 with a scale for each block, as DeepSeek-V3 publishes its weights.
    """
    from moec.cli.options import UsageError
    from moec.cli.output import note
    from moec.codegen.artifact import artifact_folder, check_output
    from moec.errors import near
    from moec.frontend.fp8_export import export_fp8
    from moec.frontend.source import find_model

    if scale not in ("f32", "ue8m0"):
        raise UsageError(message=f"--scale {scale!r} is not known{near(scale, ['f32', 'ue8m0'])}")
    check_output(out)
    find_model(str(folder.resolve()))
    with artifact_folder(out) as work:
        line = export_fp8(folder, work, scale, block)
    note(f"{line}; wrote {out}")
