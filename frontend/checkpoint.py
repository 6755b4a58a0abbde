"""Checkpoints in safetensors: found, checked against the module's weight programs, and read tensor by tensor.

Only headers are read before packing. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import ClassVar

import torch

from moec.errors import InputError, near, printable
from moec.frontend.mxfp4 import read_blocks
from moec.frontend.safetensors_header import CheckpointError, TensorEntry, read_header
from moec.ir import Module, Op, Weight
from moec.ir.numeric import TORCH, powers_of_two
from moec.ir.ops.weight_sources import name_indices, tensor_name
from moec.ir.rewrite import retype

READABLE = ("f32", "bf16", "f16", "f64")
SCALED = ("fp8_e4m3", "fp8_e5m2")
SCALE_NAMES = ("_scale_inv", "_scale")
"""Endings of a scale tensor's name behind its weight's: `q_proj.weight_scale_inv`."""
BYTES = ("u8",)
"""Types of packed data, which is read where a program asks for it."""


class TensorError(InputError):
    """A tensor that is not what the model's configuration says."""

    template: ClassVar[str] = "{folder}: tensor {tensor} {message}"


@dataclass
class Checkpoint:
    """The tensors of a folder by name."""

    folder: Path
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    block: tuple[int, int] = (128, 128)
    """Rows and columns of a weight that share a scale, by the folder's `quantization_config`."""
    scale_format: str = "f32"
    _maps: dict[Path, torch.Tensor] = field(default_factory=dict, repr=False)

    def load(self, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """One tensor, a view of the mapped file; shape and type were checked by `bind`."""
        entry = self.tensors[name]
        if entry.file not in self._maps:
            size = entry.file.stat().st_size
            self._maps[entry.file] = torch.from_file(str(entry.file), shared=False, size=size, dtype=torch.uint8)
        raw = self._maps[entry.file][entry.start : entry.start + entry.nbytes]
        if entry.dtype == "ue8m0":
            return torch.exp2(raw.float() - 127).reshape(shape)
        # A mapped tensor need not start on a multiple of its element size.
        itemsize = TORCH[entry.dtype].itemsize
        aligned = raw if entry.start % itemsize == 0 else raw.clone()
        tensor = aligned.view(TORCH[entry.dtype]).reshape(shape)
        if self.scale_format == "ue8m0" and name.endswith(SCALE_NAMES) and not powers_of_two(tensor.float()):
            message = "holds scales that are no powers of two, though config.json declares ue8m0"
            raise TensorError(folder=self.folder, tensor=name, message=message)
        return tensor


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a folder's safetensors files, of those that its index names when it has one.

    Raises CheckpointError for missing or damaged files, and for a tensor that two of them hold where no index says
    which is meant.
    """
    if not folder.is_dir():
        message = "is a file; give the folder of the weights" if folder.exists() else "no such folder"
        raise CheckpointError(file=folder, message=message)
    index = folder / "model.safetensors.index.json"
    block, scale_format = quantisation(folder)
    meant = _indexed(index) if index.exists() else {}
    names = sorted(set(meant.values())) if index.exists() else [p.name for p in sorted(folder.glob("*.safetensors"))]
    if not names:
        pickled = any(next(folder.glob(pattern), None) for pattern in ("*.bin", "*.pt", "*.pth"))
        hint = " (pickled files are not read: convert them to safetensors)" if pickled else ""
        raise CheckpointError(file=folder, message=f"holds no .safetensors file{hint}")
    checkpoint = Checkpoint(folder, block=block, scale_format=scale_format)
    for name in names:
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(file=index, message=f"names a file outside the folder: {name!r}")
        if not path.is_file():
            raise CheckpointError(file=path, message="is named by the index but missing")
        for tensor, entry in read_header(path).items():
            other = checkpoint.tensors.get(tensor)
            if other is None or meant.get(tensor) == name:
                checkpoint.tensors[tensor] = entry
            elif meant.get(tensor) != other.file.name:
                message = f"holds tensor {printable(tensor)}, as {printable(other.file.name)} does: which one is meant?"
                raise CheckpointError(file=path, message=f"{message} Move the other file away")
    return checkpoint


def quantisation(folder: Path) -> tuple[tuple[int, int], str]:
    """Block and scale format that `quantization_config` of a folder's config.json declares, or the usual ones.

    Raises CheckpointError for a quantisation that cannot be read.
    """
    path = folder / "config.json"
    try:
        declared = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") if path.is_file() else None
    except (OSError, ValueError, AttributeError, RecursionError):
        declared = None
    if not isinstance(declared, dict):
        return (128, 128), "f32"
    method = declared.get("quant_method")
    if method == "mxfp4":
        return (128, 128), "f32"
    if method != "fp8":
        message = f"quantization_config has quant_method {printable(method)!r}: fp8 can be read, and mxfp4"
        raise CheckpointError(file=path, message=message)
    block = declared.get("weight_block_size") or [128, 128]
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and 0 < b < 1 << 20 for b in block)):
        message = f"quantization_config has weight_block_size {printable(block)}: want two positive sizes"
        raise CheckpointError(file=path, message=message)
    scale = declared.get("scale_fmt") or "f32"
    return (block[0], block[1]), "ue8m0" if scale == "ue8m0" else "f32"


def _indexed(index: Path) -> dict[str, str]:
    """The file that an index names for each tensor."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {tensor: os.path.normpath(file) for tensor, file in named.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(file=index, message="is not an index of safetensors files") from None


def bind(module: Module, checkpoint: Checkpoint) -> list[str]:
    """Check every tensor that the module loads and take its element type; returns notes on what is left unused.

    Raises TensorError for a missing tensor, another shape (both are named) or a type that cannot be read.
    """
    used: set[str] = set()
    read_blocks(module, checkpoint.tensors)
    for weight in module.weights.values():
        for op in [o for o in weight.program.ops if o.name == "weight.load_scaled"]:
            for name in tensor_names(weight, op):
                used |= {name, _check_scaled(checkpoint, name, op)}
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


def adopt(module: Module, checkpoint: Checkpoint) -> list[str]:
    """Load tensors that the checkpoint holds in FP8 with their scales, instead of as plain tensors; returns notes.

    A load follows the first of its tensors: `bind` checks that the others agree. Raises TensorError for an FP8 tensor
    without scales or with scales of another shape than its blocks ask for.
    """
    found: Counter[str] = Counter()
    for weight in module.weights.values():
        for op in [o for o in weight.program.ops if o.name == "weight.load"]:
            name = next(tensor_names(weight, op))
            entry = checkpoint.tensors.get(name)
            if entry is None or entry.dtype not in SCALED:
                continue
            ending, scales = _scales_of(checkpoint, name)
            block = _block(checkpoint, name, entry, scales)
            op.name = "weight.load_scaled"
            op.attrs["dtype"] = entry.dtype
            op.attrs |= {"scales": f"{op.attrs['tensor']}{ending}", "granularity": f"{block[0]}x{block[1]}"}
            op.attrs["scale"] = "ue8m0" if scales.dtype == "ue8m0" or checkpoint.scale_format == "ue8m0" else "f32"
            found[f"{entry.dtype} scale({op.attrs['scale']}, {block[0]}x{block[1]})"] += 1
    if found:
        retype(module)
    return [f"checkpoint holds {count} kinds of weights as {kind}, kept as they are" for kind, count in found.items()]


def _scales_of(checkpoint: Checkpoint, name: str) -> tuple[str, TensorEntry]:
    """The scales of an FP8 tensor, with the ending of their name."""
    for ending in SCALE_NAMES:
        if (entry := checkpoint.tensors.get(name + ending)) is not None:
            return ending, entry
    message = f"is FP8 without scales: want {name.rsplit('.', 1)[-1]}{SCALE_NAMES[0]} beside it"
    raise TensorError(folder=checkpoint.folder, tensor=name, message=message)


def _block(checkpoint: Checkpoint, name: str, entry: TensorEntry, scales: TensorEntry) -> tuple[int, int]:
    """Rows and columns that share a scale: as the configuration says, or as the shape of the scales tells."""
    if len(entry.shape) != 2:
        raise TensorError(folder=checkpoint.folder, tensor=name, message=f"is FP8 of shape {list(entry.shape)}")
    (rows, columns), shape = entry.shape, scales.shape
    for block in (checkpoint.block, (128, 128)):
        if shape == (-(-rows // block[0]), -(-columns // block[1])):
            return block
    if prod(shape, start=1) == 1:
        return 0, 0
    if shape in ((rows, 1), (rows,)):
        return 1, 0
    wanted = f"[{-(-rows // checkpoint.block[0])}, {-(-columns // checkpoint.block[1])}]"
    message = (
        f"of shape {list(entry.shape)} has scales of shape {list(shape)}: blocks of "
        f"{checkpoint.block[0]}x{checkpoint.block[1]} ask for {wanted}"
    )
    raise TensorError(folder=checkpoint.folder, tensor=name, message=message)


def _check_scaled(checkpoint: Checkpoint, name: str, op: Op) -> str:
    """The name of the scales of an FP8 tensor, which must have type, shape and blocks as the load says."""
    entry = checkpoint.tensors.get(name)
    want = op.attrs["shape"]
    assert isinstance(want, tuple)
    if entry is None:
        raise TensorError(folder=checkpoint.folder, tensor=name, message="is missing")
    if entry.dtype != op.attrs["dtype"]:
        message = f"has element type {entry.dtype}, others of its kind have {op.attrs['dtype']}"
        raise TensorError(folder=checkpoint.folder, tensor=name, message=message)
    if entry.shape != want:
        file = printable(entry.file.name)
        message = f"in {file} has shape {list(entry.shape)}, the configuration asks for {list(want)}"
        raise TensorError(folder=checkpoint.folder, tensor=name, message=message)
    ending, scales = _scales_of(checkpoint, name)
    block = _block(checkpoint, name, entry, scales)
    if f"{block[0]}x{block[1]}" != op.attrs["granularity"]:
        message = f"has scale blocks of {block[0]}x{block[1]}, others of its kind {op.attrs['granularity']}"
        raise TensorError(folder=checkpoint.folder, tensor=name, message=message)
    return name + ending


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
        message = f"has element type {entry.dtype}; trace the model with these weights, so that their scales are read"
        raise TensorError(folder=checkpoint.folder, tensor=name, message=message)
    if entry.shape != want:
        file = printable(entry.file.name)
        message = f"in {file} has shape {list(entry.shape)}, the configuration asks for {list(want)}"
        raise TensorError(folder=checkpoint.folder, tensor=name, message=message)
    if entry.dtype not in READABLE and not (entry.dtype in BYTES and op.attrs["dtype"] in BYTES):
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
        if name.endswith(SCALE_NAMES):
            x = torch.full(shape, 2.0**-6)
        elif len(shape) == 1:
            x = 1 + 0.1 * x if "norm" in name else 0.02 * x
        elif "embed" not in name:
            x *= shape[-1] ** -0.5
        return x.to(TORCH[dtype])
