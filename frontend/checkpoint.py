"""Checkpoints in safetensors: found, checked against the module's weight programs, and read tensor by tensor.

Only headers are read before packing. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch

from moec.errors import InputError, near
from moec.ir import Module, Op, Weight
from moec.ir.numeric import TORCH
from moec.ir.rewrite import retype

DTYPES = {
    "F64": "f64",
    "F32": "f32",
    "BF16": "bf16",
    "F16": "f16",
    "F8_E4M3": "fp8_e4m3",
    "I64": "i64",
    "I32": "i32",
    "U8": "u8",
}


class CheckpointError(InputError):
    """Weights that are missing or damaged."""

    template: ClassVar[str] = "{file}: {message}"


class TensorError(InputError):
    """A tensor that is not what the model's configuration says."""

    template: ClassVar[str] = "{folder}: tensor {tensor} {message}"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: file, element type, shape, first byte and number of bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


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
    """Read the headers of a folder's safetensors files; raises CheckpointError for missing or truncated ones."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(file=index, message="is not an index of safetensors files") from None
    else:
        names = [p.name for p in sorted(folder.glob("*.safetensors"))]
    if not names:
        hint = " (pickled .bin files are not read: convert them)" if list(folder.glob("*.bin")) else ""
        raise CheckpointError(file=folder, message=f"holds no .safetensors file{hint}")
    checkpoint = Checkpoint(folder)
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(file=path, message="is named by the index but missing")
        checkpoint.tensors.update(_read_header(path))
    return checkpoint


def _read_header(path: Path) -> Iterator[tuple[str, TensorEntry]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(file=path, message=f"is truncated: {size} bytes cannot hold its header")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            entries = {n: e for n, e in header.items() if n != "__metadata__"}
            end = max((e["data_offsets"][1] for e in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(file=path, message="has no readable safetensors header") from None
    if 8 + length + end > size:
        raise CheckpointError(file=path, message=f"is truncated: {size} bytes, its header promises {8 + length + end}")
    for name, e in entries.items():
        start, stop = e["data_offsets"]
        dtype = DTYPES.get(e["dtype"], str(e["dtype"]))
        yield name, TensorEntry(path, dtype, tuple(e["shape"]), 8 + length + start, stop - start)


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
    ranges = [(n, range(a, b)) for n, a, b in weight.indices if "{" + n + "}" in name]
    for point in product(*(r for _, r in ranges)):
        out = name
        for (index, _), value in zip(ranges, point, strict=True):
            out = out.replace("{" + index + "}", str(value))
        yield out


def _entry(checkpoint: Checkpoint, name: str, op: Op) -> TensorEntry:
    entry = checkpoint.tensors.get(name)
    if entry is None:
        hint = near(name, list(checkpoint.tensors)) if len(checkpoint.tensors) < 20000 else ""
        raise TensorError(folder=checkpoint.folder, tensor=name, message=f"is missing{hint}")
    want = op.attrs["shape"]
    if entry.shape != want:
        message = f"in {entry.file.name} has shape {list(entry.shape)}, the configuration asks for {list(want)}"  # type: ignore[arg-type]
        raise TensorError(folder=checkpoint.folder, tensor=name, message=message)
    if entry.dtype not in ("f32", "bf16", "f16", "f64"):
        message = f"has element type {entry.dtype}; f32, bf16 and f16 can be read"
        raise TensorError(folder=checkpoint.folder, tensor=name, message=message)
    return entry


def _leftovers(checkpoint: Checkpoint, used: set[str]) -> list[str]:
    left = sorted(set(checkpoint.tensors) - used)
    layers = {n.split(".")[2] for n in used if n.startswith("model.layers.")}
    extra = [n for n in left if n.startswith("model.layers.") and n.split(".")[2] not in layers]
    other = [n for n in left if n not in set(extra) and not n.endswith("rotary_emb.inv_freq")]
    notes = []
    if extra:
        notes.append(f"{len(extra)} tensors of the multi-token-prediction module (layer {extra[0].split('.')[2]}) are kept aside")
    if other:
        notes.append(f"{len(other)} tensors are not used by the model, the first is {other[0]}")
    return notes


@dataclass(frozen=True)
class RandomWeights:
    """Random tensors, a function of seed and name alone: norms near 1, biases near 0, matrices of unit output variance."""

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
