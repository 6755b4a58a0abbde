"""Weights of an artifact: where their tensors come from, and the files that they are packed into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moec.errors import InputError

if TYPE_CHECKING:
    from moec.codegen.resume import Partial
    from moec.frontend import ModelSource
    from moec.ir import Module
    from moec.ir.mesh import Mesh

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


class NoWeights(InputError):
    """A model without weights, where weights were needed."""

    template: ClassVar[str] = "{model} has no weights: pass --weights FOLDER, --random-weights SEED or --no-weights"


@dataclass(frozen=True)
class Tensors:
    """Checkpoint tensors by name, shape and type; `origin` tells them from others, None where nothing can."""

    load: Callable[[str, tuple[int, ...], str], Any]
    origin: Any = None


def tensors_of(module: Module, source: ModelSource, weights: str | Path | None, seed: int | None, say: Say) -> Tensors:
    """From `weights`, else random numbers, else from what belongs to the model; checked against the weight programs.

    Raises NoWeights, CheckpointError or TensorError.
    """
    from moec.frontend.checkpoint import RandomWeights, bind, open_checkpoint

    if weights is None and seed is not None:
        return Tensors(RandomWeights(seed).load, {"random": seed})
    if weights is None and (tensors := getattr(source, "tensors", None)):
        return Tensors(lambda name, shape, dtype: tensors[name])
    folder = Path(weights) if weights is not None else source.folder
    if folder is None:
        raise NoWeights(model=source.name)
    checkpoint = open_checkpoint(folder)
    for line in bind(module, checkpoint):
        say(line)
    files = sorted({entry.file for entry in checkpoint.tensors.values()})
    stats = [(file, file.stat()) for file in files]
    return Tensors(checkpoint.load, [[str(file.resolve()), s.st_size, s.st_mtime_ns] for file, s in stats])


def pack_ranks(
    modules: Sequence[Module], mesh: Mesh, tensors: Tensors, folder: Path, partial: Partial | None, progress: Progress
) -> None:
    """Write the weight file of every rank into `folder`, by way of the partial state where there is one.

    `modules` are those of the pipeline's stages. Raises OSError.
    """
    from moec.codegen.pack import pack_weights
    from moec.codegen.resume import place

    for rank in range(mesh.ranks):
        name = f"rank-{rank:05}.safetensors"
        journal = partial.journal(name) if partial else None
        path = journal.path if journal else folder / name
        part = _part_of(progress, rank, mesh.ranks)
        pack_weights(modules[mesh.index(rank, "pp")], tensors.load, path, part, rank, journal)
        if journal:
            place(path, folder / name)


def _part_of(progress: Progress, rank: int, ranks: int) -> Progress:
    """Progress of one of several files as progress of all."""
    return lambda done, total: progress(rank * total + done, ranks * total)


def account(module: Module, tensors: Tensors, dump: Path | None, say: Say) -> None:
    """Measure what was announced: weights that were quantised twice, and for a report in `dump` all that are scaled."""
    from moec.ir.accounting import measure, requantised
    from moec.passes.report.noise import add_quantisation

    twice = requantised(module)
    wanted = None if dump is not None else set(twice)
    if wanted is not None and not wanted:
        return
    noises = measure(module, tensors.load, points=4, only=wanted)
    for name in twice:
        worst = min((n.weight_db for n in noises if n.weight == name), default=float("inf"))
        say(f"@{name}: quantised again, {worst:.1f} dB from what the checkpoint holds")
    if dump is not None:
        add_quantisation(dump / "report.html", noises)
