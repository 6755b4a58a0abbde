"""The tensors of a DeepSeek-V2/V3 model: the one table behind the GGUF file, the bytes of a step and its operations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moec.frontend import find_model
from moec.frontend.source import ModelSource
from moec.model_defs.deepseek_v3.config import Config

SMALL = {
    "hidden_size": "256", "intermediate_size": "512", "moe_intermediate_size": "128", "num_hidden_layers": "3",
    "num_attention_heads": "4", "kv_lora_rank": "64", "q_lora_rank": "96", "qk_rope_head_dim": "32",
    "qk_nope_head_dim": "64", "v_head_dim": "64", "n_routed_experts": "16", "num_experts_per_tok": "4",
    "vocab_size": "512", "max_position_embeddings": "4096",
}  # fmt: skip
"""Fields that turn a preset into one of a million parameters, in multiples of 32 as quantised blocks need."""


@dataclass(frozen=True)
class Tensor:
    """A weight under llama.cpp's name; `shape` ends with the dimension that is summed over.

    `matrix`: it is quantised where weights are; the rest stays FP32. `used`: the share of it that one token reads.
    """

    name: str
    shape: tuple[int, ...]
    matrix: bool = True
    used: float = 1.0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def source(model: str, small: bool) -> ModelSource:
    """The model to measure; raises UnknownModel, FolderError or OverrideError."""
    return find_model(model, SMALL if small else None)


def tensors(c: Config) -> Iterator[Tensor]:
    """All weights. The projection from latents to keys and values comes as two, as absorbed decoding reads it."""
    tied = c.tie_word_embeddings
    yield Tensor("token_embd.weight", (c.vocab_size, c.hidden_size), used=1.0 if tied else 1 / c.vocab_size)
    for layer in range(c.num_hidden_layers):
        moe = layer >= c.first_k_dense_replace
        for t in (*_attention(c), *(_moe(c) if moe else _dense(c))):
            yield Tensor(f"blk.{layer}.{t.name}", t.shape, t.matrix, t.used)
    yield Tensor("output_norm.weight", (c.hidden_size,), matrix=False)
    if not tied:
        yield Tensor("output.weight", (c.vocab_size, c.hidden_size))


def _attention(c: Config) -> Iterator[Tensor]:
    hidden, heads, latent = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    yield Tensor("attn_norm.weight", (hidden,), matrix=False)
    if c.q_lora_rank is None:
        yield Tensor("attn_q.weight", (heads * c.qk_head_dim, hidden))
    else:
        yield Tensor("attn_q_a.weight", (c.q_lora_rank, hidden))
        yield Tensor("attn_q_a_norm.weight", (c.q_lora_rank,), matrix=False)
        yield Tensor("attn_q_b.weight", (heads * c.qk_head_dim, c.q_lora_rank))
    yield Tensor("attn_kv_a_mqa.weight", (latent + c.qk_rope_head_dim, hidden))
    yield Tensor("attn_kv_a_norm.weight", (latent,), matrix=False)
    yield Tensor("attn_k_b.weight", (heads, latent, c.qk_nope_head_dim))
    yield Tensor("attn_v_b.weight", (heads, c.v_head_dim, latent))
    yield Tensor("attn_output.weight", (hidden, heads * c.v_head_dim))
    yield Tensor("ffn_norm.weight", (hidden,), matrix=False)


def _dense(c: Config) -> Iterator[Tensor]:
    yield from _swiglu("", c.hidden_size, c.intermediate_size)


def _moe(c: Config) -> Iterator[Tensor]:
    experts = c.n_routed_experts
    yield Tensor("ffn_gate_inp.weight", (experts, c.hidden_size), matrix=False)
    if c.group_score == "top2":
        yield Tensor("exp_probs_b.bias", (experts,), matrix=False)
    for t in _swiglu("_exps", c.hidden_size, c.moe_intermediate_size):
        yield Tensor(t.name, (experts, *t.shape), used=c.num_experts_per_tok / experts)
    if c.n_shared_experts:
        yield from _swiglu("_shexp", c.hidden_size, c.n_shared_experts * c.moe_intermediate_size)


def _swiglu(suffix: str, hidden: int, inner: int) -> Iterator[Tensor]:
    yield Tensor(f"ffn_gate{suffix}.weight", (inner, hidden))
    yield Tensor(f"ffn_up{suffix}.weight", (inner, hidden))
    yield Tensor(f"ffn_down{suffix}.weight", (hidden, inner))


def parameters(c: Config) -> int:
    """Weights of the model."""
    return sum(t.size for t in tensors(c))


def stored(t: Tensor, bytes_per_weight: float, bytes_per_expert_weight: float | None = None) -> float:
    """Bytes of an element of a tensor; what is no matrix has 4."""
    if not t.matrix:
        return 4
    return bytes_per_expert_weight if bytes_per_expert_weight and "_exps" in t.name else bytes_per_weight


def step_bytes(
    c: Config, bytes_per_weight: float, bytes_per_expert_weight: float | None = None, batch: int = 1
) -> float:
    """Bytes of weights that a decode step of `batch` tokens reads, when each chooses its experts by chance."""

    def part(t: Tensor) -> float:
        # Of several tokens' experts some are the same; rows of the embedding are few.
        return 1 - (1 - t.used) ** batch if t.used < 1 else 1.0

    return sum(t.size * part(t) * stored(t, bytes_per_weight, bytes_per_expert_weight) for t in tensors(c))


def attention_step(c: Config, context: int, element: int) -> tuple[float, float]:
    """(bytes, floating-point operations) of one token's absorbed attention over `context` cached ones, in all layers.

    `element`: bytes of a cached value. No way with fewer bytes is known; keys of every head would be many times more.
    """
    width = c.kv_lora_rank + c.qk_rope_head_dim
    pairs = c.num_hidden_layers * context
    return float(pairs * width * element), 2.0 * pairs * c.num_attention_heads * (width + c.kv_lora_rank)


def prefill_operations(c: Config, tokens: int) -> float:
    """Floating-point operations of a prompt: each weight that a token uses once, and plain causal attention.

    The head is computed for the last token alone.
    """
    head = "token_embd.weight" if c.tie_word_embeddings else "output.weight"
    body = sum(t.size * t.used for t in tensors(c) if len(t.shape) > 1 and t.name not in ("token_embd.weight", head))
    pairs = c.num_hidden_layers * c.num_attention_heads * tokens * (tokens + 1) / 2
    return 2.0 * (tokens * body + c.vocab_size * c.hidden_size + pairs * (c.qk_head_dim + c.v_head_dim))
