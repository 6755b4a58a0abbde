"""A model that no family declares: DeepSeek-V3's parts with attention and feed-forward side by side on one norm.

    moec compile examples/parallel_block.py:ParallelBlock --random-weights 0 --out parallel.moec

The class names its configuration and is built on the meta device; tensors are named as in the family.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from moec.model_defs import functional as F
from moec.model_defs.deepseek_v3.config import Config
from moec.model_defs.deepseek_v3.model import Attention, Model, Moe
from moec.model_defs.layers import Layers, weight

Tensor = Any


class ParallelLayer(nn.Module):
    """y = x + attention(norm(x)) + experts(norm(x)): one norm and one residual sum a layer."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.eps = c.rms_norm_eps
        self.input_norm = weight(c.hidden_size)
        self.attn = Attention(c)
        self.mlp = Moe(c)

    def forward(
        self,
        layer: Tensor,
        x: Tensor,
        kv: Tensor,
        seq: Tensor,
        pos: Tensor,
        pages: Tensor,
        starts: Tensor,
        rope: Tensor,
    ) -> Tensor:
        normed = F.rms_norm(x, self.input_norm, self.eps)
        attended = self.attn(layer, normed, kv, seq, pos, pages, starts, rope)
        return F.add(x, F.add(attended, self.mlp(normed)))


class ParallelBlock(Model):
    """The whole model; `config` takes the fields of a DeepSeek-V3 config.json."""

    config: ClassVar[dict[str, Any]] = {
        "model_type": "deepseek_v3",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "max_position_embeddings": 512,
    }

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.moe_layers = Layers(ParallelLayer(c), 0, c.num_hidden_layers - 1)
