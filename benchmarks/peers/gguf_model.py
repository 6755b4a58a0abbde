"""A GGUF file of a model's geometry with random quantised weights, for llama.cpp (architecture `deepseek2`).

Blocks are drawn, not quantised from drawn weights: a kernel's time does not depend on their values. Scales give every
matrix outputs of unit variance, so that activations stay finite and routing spreads over the experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
from numpy.typing import NDArray

from moec.errors import InputError
from moec.model_defs.deepseek_v3.config import Config
from peers.geometry import Tensor, tensors

Draw = Callable[[np.random.Generator, Tensor], NDArray[Any]]
_SLICE = 1 << 26


class UnevenBlocks(InputError):
    """A dimension that GGUF's blocks of 32 do not divide."""

    template: ClassVar[str] = "{name} has rows of {columns} weights, not a multiple of 32: {format} cannot hold it"


def write(path: Path, c: Config, fmt: str, seed: int) -> None:
    """Write the file at `path`, whole or not at all; `fmt` is Q8_0 or Q4_0. Raises UnevenBlocks."""
    kinds = {t.name: _kind(t, fmt) for t in tensors(c)}
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "deepseek2")
    _metadata(writer, c, fmt)
    for t in tensors(c):
        blocks, size = gguf.GGML_QUANT_SIZES[kinds[t.name]]
        dtype = np.dtype(np.float32) if kinds[t.name] == gguf.GGMLQuantizationType.F32 else np.dtype(np.uint8)
        stored = t.shape if dtype == np.float32 else (*t.shape[:-1], t.shape[-1] // blocks * size)
        nbytes = t.size // blocks * size
        writer.add_tensor_info(t.name, stored, dtype, nbytes, None if dtype == np.float32 else kinds[t.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for t in tensors(c):
        writer.write_tensor_data(_draw(rng, t, kinds[t.name]))
    writer.close()
    os.replace(part, path)


def _kind(t: Tensor, fmt: str) -> gguf.GGMLQuantizationType:
    if not t.matrix:
        return gguf.GGMLQuantizationType.F32
    if t.shape[-1] % 32:
        raise UnevenBlocks(name=t.name, columns=t.shape[-1], format=fmt)
    return gguf.GGMLQuantizationType[fmt]


def _draw(rng: np.random.Generator, t: Tensor, kind: gguf.GGMLQuantizationType) -> NDArray[Any]:
    if kind == gguf.GGMLQuantizationType.F32:
        x = rng.standard_normal(t.shape, dtype=np.float32)
        if t.name.endswith("norm.weight"):
            return np.float32(1) + np.float32(0.1) * x
        return x * np.float32(0.02 if len(t.shape) == 1 else t.shape[-1] ** -0.5)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.empty((t.size // block, size), dtype=np.uint8)
    flat = data.reshape(-1)
    for start in range(0, flat.size, _SLICE):
        part = flat[start : start + _SLICE]
        part[:] = np.frombuffer(rng.bytes(part.size), dtype=np.uint8)
    # Integers of a block are uniform over 256 values, or over 16.
    deviation = (256 if kind == gguf.GGMLQuantizationType.Q8_0 else 16) / 12**0.5
    wanted = 1.0 if t.name == "token_embd.weight" else t.shape[-1] ** -0.5
    data[:, :2] = np.array([wanted / deviation], dtype=np.float16).view(np.uint8)
    return data.reshape(*t.shape[:-1], t.shape[-1] // block * size)


def _metadata(writer: gguf.GGUFWriter, c: Config, fmt: str) -> None:
    writer.add_name("random weights")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{fmt}"])
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    # Absorbed attention has one head of keys, the latent cache itself, which is also its values.
    writer.add_head_count_kv(1)
    writer.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    if c.q_lora_rank is not None:
        writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_leading_dense_block_count(c.first_k_dense_replace)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    gate = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(gate.SIGMOID if c.score == "sigmoid" else gate.SOFTMAX)
    if c.n_group > 1:
        writer.add_expert_group_count(c.n_group)
        writer.add_expert_group_used_count(c.topk_group)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("none")
