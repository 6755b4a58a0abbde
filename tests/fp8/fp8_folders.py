"""FP8 checkpoints of small models by two writers, and a dequantiser of its own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import save_model
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from moec.frontend.fp8_export import export_fp8


def ours(variant: str, folder: Path, scale: str = "f32", block: int = 128) -> Path:
    """A variant in FP8 by our exporter."""
    save_model(variant, folder / "plain", seed=len(variant))
    out = folder / "fp8"
    out.mkdir()
    export_fp8(folder / "plain", out, scale, block)
    return out


def theirs(variant: str, folder: Path, block: tuple[int, int] | None, scale: str | None = None) -> Path:
    """A variant in FP8 by the quantiser of transformers; it leaves matrices whose sizes are not multiples alone."""
    save_model(variant, folder / "plain", seed=len(variant))
    declared = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    declared |= {"weight_block_size": list(block) if block else None}  # type: ignore[dict-item]
    declared |= {"scale_fmt": scale} if scale else {}
    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale)
    quantiser = Fp8Quantize(SimpleNamespace(quantization_config=config))
    tensors: dict[str, Any] = {}
    for name, tensor in load_file(folder / "plain" / "model.safetensors").items():
        projection = "_proj" in name and name.endswith("weight")
        tensors |= quantiser.convert({name: tensor}) if projection else {name: tensor}
    out = folder / "fp8"
    out.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "plain" / "config.json").read_text()) | {"quantization_config": declared}
    (out / "config.json").write_text(json.dumps(raw))
    return out


def dequantised(folder: Path, out: Path, again: bool = False) -> Any:
    """The transformers model of an FP8 folder in FP32, its weights multiplied by their scales here.

    With `again` matrices in blocks that cut 128 columns are rounded once more, with a scale for 128 columns of a row.
    """
    out.mkdir()
    stored = load_file(folder / "model.safetensors")
    plain = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            scale = scale.float().reshape(-1, scale.shape[-1] if scale.ndim > 1 else 1)
            size = [1 if s == 1 else block_of(folder) for s in scale.shape]
            whole = [n if s == 1 else b for n, s, b in zip(tensor.shape, scale.shape, size, strict=True)]
            index = [torch.arange(n) // b for n, b in zip(tensor.shape, whole, strict=True)]
            tensor = tensor.float() * scale[index[0]][:, index[1]]
            if again and scale.shape[1] > 1 and whole[1] % 128:
                tensor = rounded(tensor)
        plain[name] = tensor.float().contiguous()
    save_file(plain, out / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (out / "config.json").write_text(json.dumps(raw | {"dtype": "float32", "torch_dtype": "float32"}))
    return transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def rounded(w: torch.Tensor) -> torch.Tensor:
    """A matrix after E4M3 with one scale for 128 columns of a row."""
    columns = w.shape[1]
    blocks = torch.nn.functional.pad(w, (0, -columns % 128)).reshape(w.shape[0], -1, 128)
    scale = blocks.abs().amax(-1, keepdim=True) / 448
    scale = torch.where(scale > 0, scale, 1.0)
    kept = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return kept.flatten(1)[:, :columns]


def block_of(folder: Path) -> int:
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    return int(declared["weight_block_size"][0])
