"""Weights of an artifact: where their tensors come from, and the files that they are packed into."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moec.errors import InputError, MoecError

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


class DiskTooSmall(MoecError):
    """Weights that cannot be written where they are wanted; said before hours go into them."""

    template: ClassVar[str] = (
        "{folder}: the weights take {size} and the disk has {free} free: choose another --out, fewer layers "
        "(--set num_hidden_layers=N), or --no-weights for the program alone"
    )


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

    `modules` are those of the pipeline's stages. Raises DiskTooSmall before anything is written, OSError later.
    """
    from moec.codegen.pack import pack_weights
    from moec.codegen.resume import place

    _check_room(modules, mesh, folder, partial)
    for rank in range(mesh.ranks):
        name = f"rank-{rank:05}.safetensors"
        journal = partial.journal(name) if partial else None
        path = journal.path if journal else folder / name
        part = _part_of(progress, rank, mesh.ranks)
        pack_weights(modules[mesh.index(rank, "pp")], tensors.load, path, part, rank, journal)
        if journal:
            place(path, folder / name)


def _check_room(modules: Sequence[Module], mesh: Mesh, folder: Path, partial: Partial | None) -> None:
    """Raise DiskTooSmall where the disk of `folder` has no room for what is not packed yet."""
    from moec.codegen.pack import packed_bytes
    from moec.ir.cost import amount

    size = sum(map(packed_bytes, modules)) * mesh.ranks // mesh.pp
    free = shutil.disk_usage(folder).free
    if size - (partial.nbytes if partial else 0) > free:
        raise DiskTooSmall(folder=folder.parents[1], size=amount(size, "B"), free=amount(free, "B"))


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
