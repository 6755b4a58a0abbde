"""Names of checkpoint tensors, as data: parameter of a definition -> the tensors that it is made of.

`{l}` is the layer, `{e}` the expert. Keys of layer parameters are relative to the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stored:
    """Tensors joined by rows, each stored otherwise than the definition has it.

    `stacked`: experts are the leading dim of one tensor; `transposed`: `[in, out]`; `interleaved`: rows of gate and up
    take turns; `row`: a vector stored as a matrix of one row; `columns`: (part, parts), one of equal parts of the
    columns.
    """

    names: tuple[str, ...]
    stacked: bool = False
    transposed: bool = False
    interleaved: bool = False
    row: bool = False
    columns: tuple[int, int] = (0, 1)


Names = Mapping[str, tuple[str, ...] | Stored]

LAYER = "model.layers.{l}."
ATTN = LAYER + "self_attn."


def swiglu(prefix: str, key: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Names:
    """A feed-forward `key` of three projections, with biases where the model has them."""
    bias = (f"{prefix}{gate}.bias", f"{prefix}{up}.bias")
    return {
        f"{key}gate_up": (f"{prefix}{gate}.weight", f"{prefix}{up}.weight"),
        f"{key}down": (f"{prefix}{down}.weight",),
        f"{key}gate_up_bias": bias,
        f"{key}down_bias": (f"{prefix}{down}.bias",),
    }


LLAMA: Names = {
    "embed": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "norm.bias": ("model.norm.bias",),
    "head": ("lm_head.weight",),
    "head_bias": ("lm_head.bias",),
    "input_norm.weight": (LAYER + "input_layernorm.weight",),
    "input_norm.bias": (LAYER + "input_layernorm.bias",),
    "post_norm.weight": (LAYER + "post_attention_layernorm.weight",),
    "post_norm.bias": (LAYER + "post_attention_layernorm.bias",),
    **{f"attn.{p}": (f"{ATTN}{p}_proj.weight",) for p in "qkvo"},
    **{f"attn.{p}_bias": (f"{ATTN}{p}_proj.bias",) for p in "qkvo"},
    "attn.q_norm": (ATTN + "q_norm.weight",),
    "attn.k_norm": (ATTN + "k_norm.weight",),
    **swiglu(LAYER + "mlp.", "mlp."),
}
"""The names that most families keep: those of Llama, with the norms of Qwen3."""

QWEN_EXPERTS: Names = {
    **LLAMA,
    "mlp.gate": (LAYER + "mlp.gate.weight",),
    "mlp.gate_bias": (LAYER + "mlp.gate.e_score_correction_bias",),
    **swiglu(LAYER + "mlp.experts.{e}.", "mlp.experts_"),
    **swiglu(LAYER + "mlp.shared_experts.", "mlp.shared."),
}
"""Experts under `mlp.experts`, shared ones beside them."""

MIXTRAL_EXPERTS: Names = {
    **LLAMA,
    "mlp.gate": (LAYER + "block_sparse_moe.gate.weight",),
    "mlp.gate_bias": (LAYER + "block_sparse_moe.e_score_correction_bias",),
    **swiglu(LAYER + "block_sparse_moe.experts.{e}.", "mlp.experts_", "w1", "w3", "w2"),
}
"""Experts under `block_sparse_moe`, their projections w1, w3, w2."""
