"""A multi-token-prediction module in plain torch, float64, written from the paper (arXiv 2412.19437, sec. 2.1 and 2.2).

Shares no code with moec. Tensors carry the names of the published checkpoint: those of layer N, behind the last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moec

FOLDER = Path(moec.__file__).resolve().parents[2] / "model_defs" / "presets_data" / "tiny-deepseek-v3"
"""The embedded model, which has a module."""


def add_module(folder: Path, seed: int = 0) -> None:
    """Give a saved model a module with random weights, and say so in its config.json."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    layer, hidden = config["num_hidden_layers"], config["hidden_size"]
    moe = layer >= config["first_k_dense_replace"]
    like = next(i for i in range(layer) if (f"model.layers.{i}.mlp.gate.weight" in tensors) == moe or not moe)
    if moe and f"model.layers.{like}.mlp.gate.weight" not in tensors:
        raise AssertionError("the model has no layer with experts to copy the shapes of")
    generator = torch.Generator().manual_seed(seed)
    new: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"model.layers.{like}."):
            new[name.replace(f"layers.{like}.", f"layers.{layer}.")] = _random(tensor.shape, name, generator)
    prefix = f"model.layers.{layer}."
    new[prefix + "eh_proj.weight"] = _random((hidden, 2 * hidden), "eh_proj", generator)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        new[f"{prefix}{name}.weight"] = _random((hidden,), "norm", generator)
    save_file({**tensors, **new}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))


def _random(shape: Any, name: str, generator: torch.Generator) -> Tensor:
    x: Tensor = torch.randn(tuple(shape), generator=generator)
    if len(shape) == 1:
        return 1 + 0.1 * x if "norm" in name else 0.1 * x
    scaled: Tensor = x * shape[-1] ** -0.5
    return scaled


class Oracle:
    """The module of a model folder; `logits(hidden, ids)` of one sequence."""

    def __init__(self, folder: Path) -> None:
        self.c = json.loads((folder / "config.json").read_text())
        self.layer = self.c["num_hidden_layers"]
        self.tensors: dict[str, Tensor] = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}

    def w(self, name: str) -> Tensor:
        """A tensor of the module's layer."""
        return self.tensors[f"model.layers.{self.layer}.{name}"]

    def norm(self, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        least = float(eps or self.c["rms_norm_eps"])
        y: Tensor = x / (x.square().mean(-1, keepdim=True) + least).sqrt() * weight
        return y

    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """f64[T - 1, V]: row t from states `hidden` f64[T, H] (behind the main model's last norm) and ids[t + 1]."""
        embedded = self.tensors["model.embed_tokens.weight"][ids[1:]]
        joined = torch.cat(
            (self.norm(embedded, self.w("enorm.weight")), self.norm(hidden[:-1], self.w("hnorm.weight"))), -1
        )
        x = joined @ self.w("eh_proj.weight").T
        x = x + self.attention(self.norm(x, self.w("input_layernorm.weight")))
        x = x + self.feed_forward(self.norm(x, self.w("post_attention_layernorm.weight")))
        head = "model.embed_tokens.weight" if self.c.get("tie_word_embeddings") else "lm_head.weight"
        logits: Tensor = self.norm(x, self.w("shared_head.norm.weight")) @ self.tensors[head].T
        return logits

    def attention(self, x: Tensor) -> Tensor:
        """Latent attention, equations 1 to 11."""
        c, count = self.c, len(x)
        heads, nope, rope, v = (
            c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        if c.get("q_lora_rank"):
            q = x @ self.w("self_attn.q_a_proj.weight").T + self.bias("self_attn.q_a_proj.bias")
            q = self.norm(q, self.w("self_attn.q_a_layernorm.weight"), 1e-6) @ self.w("self_attn.q_b_proj.weight").T
        else:
            q = x @ self.w("self_attn.q_proj.weight").T
        q = q.view(count, heads, nope + rope)
        latent = x @ self.w("self_attn.kv_a_proj_with_mqa.weight").T + self.bias("self_attn.kv_a_proj_with_mqa.bias")
        compressed, key_rope = latent[:, : c["kv_lora_rank"]], latent[:, c["kv_lora_rank"] :]
        compressed = self.norm(compressed, self.w("self_attn.kv_a_layernorm.weight"), 1e-6)
        kv = (compressed @ self.w("self_attn.kv_b_proj.weight").T).view(count, heads, nope + v)
        queries = torch.cat((q[..., :nope], self.turn(q[..., nope:])), -1)
        keys = torch.cat((kv[..., :nope], self.turn(key_rope[:, None]).expand(-1, heads, -1)), -1)
        scores = torch.einsum("thd,shd->hts", queries, keys) * (nope + rope) ** -0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf"))
        y = torch.einsum("hts,shd->thd", scores.softmax(-1), kv[..., nope:]).reshape(count, heads * v)
        out: Tensor = y @ self.w("self_attn.o_proj.weight").T + self.bias("self_attn.o_proj.bias")
        return out

    def bias(self, name: str) -> Tensor | float:
        return self.tensors.get(f"model.layers.{self.layer}.{name}", 0.0)

    def turn(self, x: Tensor) -> Tensor:
        """Rotary embedding of f64[T, h, d] at positions 0, 1, ...; pairs are neighbours, or a half apart."""
        count, _, dims = x.shape
        theta = (self.c.get("rope_parameters") or {}).get("rope_theta", 10000.0)
        angles = torch.arange(count).double()[:, None] * theta ** (-torch.arange(0, dims, 2).double() / dims)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = (x[..., ::2], x[..., 1::2]) if self.c.get("rope_interleave", True) else x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Experts beside the shared one, equations 12 to 16."""
        if f"model.layers.{self.layer}.mlp.gate.weight" not in self.tensors:
            return self.swiglu(x, "mlp.")
        c, experts, groups = self.c, self.c["n_routed_experts"], self.c["n_group"]
        affinity = (x @ self.w("mlp.gate.weight").T).sigmoid()
        biased = affinity + self.w("mlp.gate.e_score_correction_bias")
        best = biased.view(-1, groups, experts // groups).topk(2, -1).values.sum(-1)
        allowed = torch.zeros_like(best).scatter_(1, best.topk(c["topk_group"], -1).indices, 1.0)
        allowed = allowed.repeat_interleave(experts // groups, 1).bool()
        chosen = biased.masked_fill(~allowed, float("-inf")).topk(c["num_experts_per_tok"], -1).indices
        weights = affinity.gather(1, chosen)
        if c.get("norm_topk_prob", True):
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * c["routed_scaling_factor"]
        y = self.swiglu(x, "mlp.shared_experts.")
        rows = []
        for t in range(len(x)):
            one = x[t : t + 1]
            routed = [
                w * self.swiglu(one, f"mlp.experts.{int(e)}.") for e, w in zip(chosen[t], weights[t], strict=True)
            ]
            rows.append(y[t : t + 1] + sum(routed))
        return torch.cat(rows)

    def swiglu(self, x: Tensor, prefix: str) -> Tensor:
        gate, up = (x @ self.w(f"{prefix}{p}_proj.weight").T for p in ("gate", "up"))
        y: Tensor = (gate * gate.sigmoid() * up) @ self.w(f"{prefix}down_proj.weight").T
        return y
