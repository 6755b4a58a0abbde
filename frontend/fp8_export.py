"""A checkpoint in FP8: the matrices of a Hugging Face folder in E4M3 with a scale for each block.

The layout is that of DeepSeek-V3's published weights: `X.weight` beside `X.weight_scale_inv`, and `quantization_config`
in config.json, as transformers reads it. Embedding, head, gates, norms and biases stay as they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from moec.errors import InputError
from moec.frontend.checkpoint import READABLE, Checkpoint, open_checkpoint
from moec.ir.numeric import Quantised, quantise

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30


class NothingToQuantise(InputError):
    """A folder without matrices that an FP8 checkpoint holds in FP8."""

    template: ClassVar[str] = "{folder}: {message}"


def export_fp8(folder: Path, out: Path, scale: str = "f32", block: int = 128) -> str:
    """Write the folder's model to `out` in FP8 and return a line on what was done; never holds more than one shard.

    Raises CheckpointError, NothingToQuantise, or NumericError for infinities.
    """
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(folder)
    quantised = [n for n in checkpoint.tensors if is_matrix(checkpoint, n)]
    if any(e.dtype.startswith("fp8") for e in checkpoint.tensors.values()):
        raise NothingToQuantise(folder=folder, message="holds FP8 weights already")
    if not quantised:
        raise NothingToQuantise(folder=folder, message="holds no *_proj.weight matrices in f32, bf16 or f16")
    shards: list[list[str]] = []
    for number, tensors in enumerate(_shards(checkpoint, scale, block), start=1):
        save_file(tensors, out / f"shard-{number:05d}.safetensors", {"format": "pt"})
        shards.append(list(tensors))
    _name_shards(out, shards)
    _copy_rest(folder, out, scale, block)
    return f"{len(quantised)} of {len(checkpoint.tensors)} tensors in fp8_e4m3 scale({scale}, {block}x{block})"


def is_matrix(checkpoint: Checkpoint, name: str) -> bool:
    """Whether an FP8 checkpoint holds a tensor in FP8: the weight of a projection inside a layer."""
    entry = checkpoint.tensors[name]
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    projection = name.endswith(".weight") and "_proj" in module and module != "eh_proj"
    return projection and len(entry.shape) == 2 and entry.dtype in READABLE


def _shards(checkpoint: Checkpoint, scale: str, block: int) -> Iterator[dict[str, torch.Tensor]]:
    held: dict[str, torch.Tensor] = {}
    size = 0
    for name, entry in checkpoint.tensors.items():
        tensor = checkpoint.load(name, entry.shape, entry.dtype)
        made = {name: tensor.clone()}
        if is_matrix(checkpoint, name):
            stored = quantise(tensor, "fp8_e4m3", (block, block), scale)
            made = {name: stored.data, f"{name}_scale_inv": _scales(stored)}
        held |= made
        size += sum(t.nbytes for t in made.values())
        if size >= SHARD_BYTES:
            yield held
            held, size = {}, 0
    if held:
        yield held


def _scales(stored: Quantised) -> torch.Tensor:
    return stored.scale.float().contiguous()


def _name_shards(out: Path, shards: list[list[str]]) -> None:
    names: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (out / f"shard-{number:05d}.safetensors").rename(out / name)
        names |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": dict(sorted(names.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _copy_rest(folder: Path, out: Path, scale: str, block: int) -> None:
    """config.json with its `quantization_config`, and the files beside the weights."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix != ".safetensors" and file.name not in (INDEX, "config.json"):
            shutil.copyfile(file, out / file.name)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    declared = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        **({"scale_fmt": scale} if scale != "f32" else {}),
    }
    config["quantization_config"] = declared
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
