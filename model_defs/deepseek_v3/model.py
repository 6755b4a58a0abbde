"""The DeepSeek-V3 forward pass as a declaration (arXiv 2412.19437, sec. 2.1); V2 differs in its configuration only."""

from __future__ import annotations

from typing import Any

from torch import nn

from moec.model_defs import functional as F
from moec.model_defs.deepseek_v3.config import Config
from moec.model_defs.layers import Layers, Mlp, weight

Tensor = Any
LATENT_EPS = 1e-6
"""The norms of the compressed query and latent keep this value whatever `rms_norm_eps` says, as published."""


class Indexer(nn.Module):
    """The lightning indexer of DeepSeek-V3.2 (arXiv 2512.02556, sec. 2.1): each token's positions, by index scores."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        assert c.index is not None and c.q_lora_rank is not None
        self.c, self.i = c, c.index
        self.q = weight(self.i.heads * self.i.dim, c.q_lora_rank)
        self.k = weight(self.i.dim, c.hidden_size)
        self.k_norm = weight(self.i.dim)
        self.k_norm_bias = weight(self.i.dim)
        self.weights = weight(self.i.heads, c.hidden_size)

    def forward(
        self,
        layer: Tensor,
        x: Tensor,
        q_a: Tensor,
        kv: Tensor,
        seq: Tensor,
        pos: Tensor,
        pages: Tensor,
        rope: Tensor,
    ) -> Tensor:
        i, dims = self.i, self.c.qk_rope_head_dim
        # The rotary part stands first here, and its pairs are half a part away from one another.
        key = F.layer_norm(F.linear(x, self.k), self.k_norm, self.k_norm_bias, LATENT_EPS)
        F.append_index(kv, layer, F.rope(key, pos, rope, 0, dims, False), seq, pos, pages)
        q = F.rope(F.unflatten(F.linear(q_a, self.q), i.heads, i.dim), pos, rope, 0, dims, False)
        scale = (i.heads * i.dim) ** -0.5
        return F.choose_positions(q, F.linear(x, self.weights), kv, layer, seq, pos, pages, scale, i.top_k)


class Attention(nn.Module):
    """Multi-head latent attention over the cached latent, in the plain form; the compiler may absorb it."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        heads, rank = c.num_attention_heads, c.kv_lora_rank
        if c.q_lora_rank is None:
            self.q = weight(heads * c.qk_head_dim, c.hidden_size)
        else:
            self.q_a = weight(c.q_lora_rank, c.hidden_size)
            self.q_norm = weight(c.q_lora_rank)
            self.q_b = weight(heads * c.qk_head_dim, c.q_lora_rank)
        self.kv_a = weight(rank + c.qk_rope_head_dim, c.hidden_size)
        self.kv_norm = weight(rank)
        self.kv_b = weight(heads * (c.qk_nope_head_dim + c.v_head_dim), rank)
        self.o = weight(c.hidden_size, heads * c.v_head_dim)
        self.q_a_bias = weight(c.q_lora_rank) if c.attention_bias and c.q_lora_rank else None
        self.kv_a_bias = weight(rank + c.qk_rope_head_dim) if c.attention_bias else None
        self.o_bias = weight(c.hidden_size) if c.attention_bias else None
        self.indexer = Indexer(c) if c.index else None

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
        c = self.c
        # Queries come through a compressed one where the model has it.
        compressed = c.q_lora_rank is not None
        q_a = F.rms_norm(F.linear(x, self.q_a, self.q_a_bias), self.q_norm, LATENT_EPS) if compressed else x
        q = F.linear(q_a, self.q_b if compressed else self.q)
        q = F.unflatten(q, c.num_attention_heads, c.qk_head_dim)
        q = F.rope(q, pos, rope, c.qk_nope_head_dim, c.qk_rope_head_dim, c.rope_interleave)
        latent, key_rope = F.split(F.linear(x, self.kv_a, self.kv_a_bias), c.kv_lora_rank, c.qk_rope_head_dim)
        latent = F.rms_norm(latent, self.kv_norm, LATENT_EPS)
        key_rope = F.rope(key_rope, pos, rope, 0, c.qk_rope_head_dim, c.rope_interleave)
        F.cache_append(kv, layer, latent, key_rope, seq, pos, pages)
        chosen = self.indexer(layer, x, q_a, kv, seq, pos, pages, rope) if self.indexer is not None else None
        cached, cached_rope = F.cache_read(kv, layer, pages, starts, c.kv_lora_rank, c.index.dim if c.index else 0)
        expanded = F.linear(cached, self.kv_b)
        sizes = (c.qk_nope_head_dim, c.v_head_dim)
        y = F.mla(q, expanded, cached_rope, seq, pos, starts, chosen, c.softmax_scale, *sizes)
        return F.linear(F.flatten(y), self.o, self.o_bias)


class Moe(nn.Module):
    """Routed experts beside shared ones; the gate computes in FP32."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.gate = weight(c.n_routed_experts, c.hidden_size)
        self.gate_bias = weight(c.n_routed_experts) if c.group_score == "top2" else None
        self.experts_gate_up = weight(c.n_routed_experts, 2 * c.moe_intermediate_size, c.hidden_size)
        self.experts_down = weight(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size)
        self.shared = Mlp(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts) if c.n_shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        c = self.c
        ids, weights = F.route(
            x,
            self.gate,
            self.gate_bias,
            score=c.score,
            groups=c.n_group,
            top_groups=c.topk_group,
            group_score=c.group_score,
            top_k=c.num_experts_per_tok,
            normalise=bool(c.norm_topk_prob),
            scale=float(c.routed_scaling_factor),
        )
        routed = F.experts(x, ids, weights, self.experts_gate_up, self.experts_down, c.n_routed_experts)
        return routed if self.shared is None else F.add(routed, self.shared(x))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, c: Config, mlp: nn.Module) -> None:
        super().__init__()
        self.eps = c.rms_norm_eps
        self.input_norm = weight(c.hidden_size)
        self.attn = Attention(c)
        self.post_norm = weight(c.hidden_size)
        self.mlp = mlp

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
        x = F.add(x, self.attn(layer, normed, kv, seq, pos, pages, starts, rope))
        return F.add(x, self.mlp(F.rms_norm(x, self.post_norm, self.eps)))


class MtpLayer(Layer):
    """The layer of a multi-token-prediction module behind its joined projection (arXiv 2412.19437, eq. 21 and 22).

    The projection of the two joined vectors is the sum of two products: `e_proj` and `h_proj` are the columns of one
    matrix that stand for the embedding (first) and for the hidden state.
    """

    def __init__(self, c: Config, mlp: nn.Module) -> None:
        super().__init__(c, mlp)
        self.enorm = weight(c.hidden_size)
        self.hnorm = weight(c.hidden_size)
        self.e_proj = weight(c.hidden_size, c.hidden_size)
        self.h_proj = weight(c.hidden_size, c.hidden_size)

    def forward(  # type: ignore[override]
        self,
        layer: Tensor,
        x: Tensor,
        hidden: Tensor,
        kv: Tensor,
        seq: Tensor,
        pos: Tensor,
        pages: Tensor,
        starts: Tensor,
        rope: Tensor,
    ) -> Tensor:
        embedded = F.linear(F.rms_norm(x, self.enorm, self.eps), self.e_proj)
        seen = F.linear(F.rms_norm(hidden, self.hnorm, self.eps), self.h_proj)
        return super().forward(layer, F.add(embedded, seen), kv, seq, pos, pages, starts, rope)


def feed_forward(c: Config, layer: int) -> nn.Module:
    """The feed-forward of a layer: dense in the first ones, experts behind them."""
    return Mlp(c.hidden_size, c.intermediate_size) if layer < c.first_k_dense_replace else Moe(c)


class Model(nn.Module):
    """Token ids to logits of the wanted rows; layers of a kind are traced once.

    With `hidden` the states behind the last norm are a second result, one row for every token: what a
    multi-token-prediction module continues from.
    """

    def __init__(self, c: Config, hidden: bool = False) -> None:
        super().__init__()
        self.c, self.hidden = c, hidden
        dense = min(c.first_k_dense_replace, c.num_hidden_layers)
        self.embed = weight(c.vocab_size, c.hidden_size)
        self.rope_table = weight(c.max_position_embeddings, c.qk_rope_head_dim)
        last = c.num_hidden_layers - 1
        self.dense_layers = Layers(Layer(c, feed_forward(c, 0)), 0, dense - 1) if dense else None
        self.moe_layers = Layers(Layer(c, feed_forward(c, last)), dense, last) if dense <= last else None
        self.norm = weight(c.hidden_size)
        self.head = weight(c.vocab_size, c.hidden_size)

    def forward(
        self, ids: Tensor, seq: Tensor, pos: Tensor, pages: Tensor, starts: Tensor, rows: Tensor, kv: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        x = F.embed(ids, self.embed)
        state = (kv, seq, pos, pages, starts, self.rope_table)
        if self.dense_layers is not None:
            x = self.dense_layers(x, *state)
        if self.moe_layers is not None:
            x = self.moe_layers(x, *state)
        if not self.hidden:
            return F.linear(F.rms_norm(F.rows(x, rows), self.norm, self.c.rms_norm_eps), self.head, out="f32")
        x = F.rms_norm(x, self.norm, self.c.rms_norm_eps)
        return F.linear(F.rows(x, rows), self.head, out="f32"), x


class Draft(nn.Module):
    """The multi-token-prediction module (arXiv 2412.19437, sec. 2.2): logits of the token after `ids`.

    `ids[t]` is the token at position `pos[t] + 1`, `hidden[t]` the main model's state behind its last norm at `pos[t]`.
    Embedding and head are the main model's; the module's layer is the cache's last. The second result, states of the
    wanted rows, may stand in for the main model's where the module is applied again to draft one more token.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        layer = c.num_hidden_layers
        self.embed = weight(c.vocab_size, c.hidden_size)
        self.rope_table = weight(c.max_position_embeddings, c.qk_rope_head_dim)
        self.mtp = Layers(MtpLayer(c, feed_forward(c, layer)), layer, layer)
        self.mtp_norm = weight(c.hidden_size)
        self.head = weight(c.vocab_size, c.hidden_size)

    def forward(
        self,
        ids: Tensor,
        seq: Tensor,
        pos: Tensor,
        pages: Tensor,
        starts: Tensor,
        rows: Tensor,
        hidden: Tensor,
        kv: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x = self.mtp(F.embed(ids, self.embed), hidden, kv, seq, pos, pages, starts, self.rope_table)
        states = F.rms_norm(F.rows(x, rows), self.mtp_norm, self.c.rms_norm_eps)
        return F.linear(states, self.head, out="f32"), states
