"""`moec tune`: measure other tiles of an artifact's GPU kernels on the GPU here, and keep those that win."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tune")(tune)


def tune(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact for a CUDA target, with weights.")],
    repeats: Annotated[int, typer.Option(min=1, help="Launches that are timed of every tile.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the tiles of GPU kernels on this machine.

    The next compilation for the GPU's architecture takes the fastest. Needs a GPU of the artifact's architecture and
    the package triton.
    """
    from datetime import date

    from moec import targets
    from moec.cli.output import note
    from moec.codegen.triton import tiles
    from moec.codegen.triton.tune import tune as measure
    from moec.ir import parse_module
    from moec.runtime.artifact import open_artifact
    from moec.runtime.cuda.engine import GpuEngine
    from moec.runtime.errors import NotForGpu

    opened = open_artifact(artifact)
    manifest = opened.manifest
    if manifest.kind != "cuda":
        raise NotForGpu(path=artifact, target=manifest.target, kind=manifest.kind)
    engine = GpuEngine(opened)
    file = opened.path / "program.ir"
    module = parse_module(file.read_text(encoding="utf-8"), str(file))
    limits = {"batch": manifest.batch, "context": manifest.context, "chunk": manifest.chunk}
    source = f"measured on {engine.driver.name()}, driver {engine.driver.version}, {date.today().isoformat()}"

    def keep(won: Mapping[str, tuple[object, tiles.Measured]]) -> None:
        if won:
            tiles.save(manifest.arch, {key: measured for key, (_, measured) in won.items()})

    results, found = measure(engine, module, targets.load(manifest.target), limits, source, repeats, note, keep)
    where = tiles.table_file(manifest.arch) if found else None
    if as_json:
        rows = [
            {"kernel": r.name, "declared_us": r.declared, "best_us": r.best, "tried": r.tried,
             "tile": {**r.tile.constants, "warps": r.tile.num_warps, "stages": r.tile.num_stages}}
            for r in results
        ]  # fmt: skip
        print(json.dumps({"kernels": rows, "source": source, "table": str(where) if where else None}))
        return
    print(f"{len(found)} of {len(results)} kernels are faster with another tile" + (f": {where}" if where else ""))
    if where:
        print(f"compile again for {manifest.target} to use them")
