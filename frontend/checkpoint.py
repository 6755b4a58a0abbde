"""Checkpoints in safetensors: found, checked against the module's weight programs, and read tensor by tensor.

Only headers are read before packing. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import ClassVar

import torch

from moec.errors import InputError, near, printable
from moec.frontend.safetensors_header import CheckpointError, TensorEntry, read_header
from moec.ir import Module, Op, Weight
from moec.ir.numeric import TORCH
from moec.ir.ops.weights import name_indices, tensor_name
from moec.ir.rewrite import retype

READABLE = ("f32", "bf16", "f16", "f64")


class TensorError(InputError):
    """A tensor that is not what the model's configuration says."""

    template: ClassVar[str] = "{folder}: tensor {tensor} {message}"


@dataclass
class Checkpoint:
    """The tensors of a folder by name."""

    folder: Path
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    _maps: dict[Path, torch.Tensor] = field(default_factory=dict, repr=False)

    def load(self, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """One tensor, a view of the mapped file; shape and type were checked by `bind`."""
        entry = self.tensors[name]
        if entry.file not in self._maps:
            size = entry.file.stat().st_size
            self._maps[entry.file] = torch.from_file(str(entry.file), shared=False, size=size, dtype=torch.uint8)
        raw = self._maps[entry.file][entry.start : entry.start + entry.nbytes]
        # A mapped tensor need not start on a multiple of its element size.
        itemsize = TORCH[entry.dtype].itemsize
        aligned = raw if entry.start % itemsize == 0 else raw.clone()
        return aligned.view(TORCH[entry.dtype]).reshape(shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a folder's safetensors files; raises CheckpointError for missing or damaged ones."""
    if not folder.is_dir():
        message = "is a file; give the folder of the weights" if folder.exists() else "no such folder"
        raise CheckpointError(file=folder, message=message)
    index = folder / "model.safetensors.index.json"
    names = _indexed(index) if index.exists() else [p.name for p in sorted(folder.glob("*.safetensors"))]
    if not names:
        pickled = any(next(folder.glob(pattern), None) for pattern in ("*.bin", "*.pt", "*.pth"))
        hint = " (pickled files are not read: convert them to safetensors)" if pickled else ""
        raise CheckpointError(file=folder, message=f"holds no .safetensors file{hint}")
    checkpoint = Checkpoint(folder)
    for name in names:
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(file=index, message=f"names a file outside the folder: {name!r}")
        if not path.is_file():
            raise CheckpointError(file=path, message="is named by the index but missing")
        checkpoint.tensors.update(read_header(path))
    return checkpoint


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(os.path.normpath(name) for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(file=index, message="is not an index of safetensors files") from None


def bind(module: Module, checkpoint: Checkpoint) -> list[str]:
    """Check every tensor that the module loads and take its element type; returns notes on what is left unused.

    Raises TensorError for a missing tensor, another shape (both are named) or a type that cannot be read.
    """
    used: set[str] = set()
    for weight in module.weights.values():
        for op in [o for o in weight.program.ops if o.name == "weight.load"]:
            entries = [(n, _entry(checkpoint, n, op)) for n in tensor_names(weight, op)]
            used.update(n for n, _ in entries)
            types = sorted({e.dtype for _, e in entries})
            if len(types) > 1:
                message = f"and its like have several element types ({', '.join(types)})"
                raise TensorError(folder=checkpoint.folder, tensor=entries[0][0], message=message)
            op.attrs["dtype"] = types[0]
    retype(module)
    return _leftovers(checkpoint, used)


def tensor_names(weight: Weight, op: Op) -> Iterator[str]:
    """The checkpoint names that one load stands for, over all index points."""
    name = str(op.attrs["tensor"])
    slots = next((o for o in weight.program.ops if o.name == "weight.slot"), None)
    # Which experts a rank holds is known at packing: all of them must be there.
    experts = {} if slots is None else {"e": range(int(slots.attrs["experts"]))}  # type: ignore[arg-type]
    ranges = [(n, experts.get(n, range(a, b))) for n, a, b in weight.indices if n in name_indices(name)]
    for point in product(*(r for _, r in ranges)):
        yield tensor_name(name, {index: value for (index, _), value in zip(ranges, point, strict=True)})


def _entry(checkpoint: Checkpoint, name: str, op: Op) -> TensorEntry:
    entry = checkpoint.tensors.get(name)
    if entry is None:
        hint = near(name, list(checkpoint.tensors)) if len(checkpoint.tensors) < 20000 else ""
        raise TensorError(folder=checkpoint.folder, tensor=name, message=f"is missing{hint}")
    want = op.attrs["shape"]
    assert isinstance(want, tuple)
    if entry.dtype.startswith("fp8"):
        message = f"has element type {entry.dtype}; FP8 checkpoints are not supported yet: convert the weights to BF16"
        raise TensorError(folder=checkpoint.folder, tensor=name, message=message)
    if entry.shape != want:
        file = printable(entry.file.name)
        message = f"in {file} has shape {list(entry.shape)}, the configuration asks for {list(want)}"
        raise TensorError(folder=checkpoint.folder, tensor=name, message=message)
    if entry.dtype not in READABLE:
        message = f"has element type {entry.dtype}; {', '.join(READABLE)} can be read"
        raise TensorError(folder=checkpoint.folder, tensor=name, message=message)
    return entry


def _leftovers(checkpoint: Checkpoint, used: set[str]) -> list[str]:
    left = [n for n in sorted(set(checkpoint.tensors) - used) if not n.endswith("rotary_emb.inv_freq")]
    predictors = sorted(n.removesuffix("eh_proj.weight") for n in left if n.endswith(".eh_proj.weight"))
    extra = [n for n in left if n.startswith(tuple(predictors))]
    other = [n for n in left if not n.startswith(tuple(predictors))]
    notes = []
    if extra:
        layers = printable(", ".join(prefix.removeprefix("model.layers.").rstrip(".") for prefix in predictors))
        notes.append(f"{len(extra)} tensors of the multi-token-prediction module (layer {layers}) are kept aside")
    if other:
        notes.append(f"{len(other)} tensors are not used by the model, the first is {printable(other[0])}")
    return notes


@dataclass(frozen=True)
class RandomWeights:
    """Random tensors, a function of seed and name alone.

    Norms lie near 1, biases near 0; matrices keep the variance of their input.
    """

    seed: int

    def load(self, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The tensor of a name."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        x = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            x = 1 + 0.1 * x if "norm" in name else 0.02 * x
        elif "embed" not in name:
            x *= shape[-1] ** -0.5
        return x.to(TORCH[dtype])
