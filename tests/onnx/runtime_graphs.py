"""Graphs as onnxruntime's model builders write them: fused attention with caches, and one node for all experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

Array = np.ndarray[Any, Any]
MS = "com.microsoft"


@dataclass
class Sizes:
    """A small model's sizes, and how its experts are written."""

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    groups: int = 2
    width: int = 16
    experts: int = 6
    chosen: int = 2
    inner: int = 32
    vocab: int = 61
    bits: int = 0
    """Of the experts' weights; 0 for floats."""
    block: int = 0
    zeros: bool = False
    """Whether integers have zero points of their own."""
    narrow: int = 0
    """Bits of the projections' weights; 0 for floats."""
    normalise: int = 1
    limit: float | None = None
    window: int = -1
    bias: bool = False


class Graph:
    """Nodes and weights as they are added."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, value: Array) -> str:
        self.weights.append(onnx.numpy_helper.from_array(value, name))
        return name

    def normal(self, name: str, *shape: int, scale: float | None = None) -> str:
        size = shape[-1] ** -0.5 if scale is None else scale
        return self.weight(name, (self.random.standard_normal(shape) * size).astype(np.float32))

    def node(self, op: str, inputs: list[str], name: str, outputs: int = 1, domain: str = "", **attrs: Any) -> str:
        out = [f"{name}/output_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, out, name=name, domain=domain, **attrs))
        return out[0]


def mixture(sizes: Sizes, seed: int) -> onnx.ModelProto:
    """Attention over grouped heads with rotation inside, RMS norms with residual sums inside, and MoE or QMoE."""
    s, g = sizes, Graph(seed)
    angles = np.arange(128)[:, None] * 10000.0 ** -(np.arange(0, s.width, 2) / s.width)
    cos, sin = (g.weight(n, f(angles).astype(np.float32)) for n, f in (("cos_cache", np.cos), ("sin_cache", np.sin)))
    counted = g.node("ReduceSum", ["attention_mask", g.weight("one", np.array([1]))], "/mask/ReduceSum")
    counted = g.node("Sub", [counted, g.weight("one_too", np.array([1]))], "/mask/Sub")
    seen = g.node("Cast", [counted], "/mask/Cast", to=TensorProto.INT32)
    total = g.node(
        "Gather",
        [g.node("Shape", ["attention_mask"], "/mask/Shape"), g.weight("at", np.array(1))],
        "/mask/Gather",
        axis=0,
    )
    total = g.node("Cast", [total], "/mask/Cast_1", to=TensorProto.INT32)
    x = g.node(
        "Gather",
        [g.normal("model.embed_tokens.weight", s.vocab, s.hidden, scale=1.0), "input_ids"],
        "/model/embed/Gather",
    )
    skip = ""
    outputs = []
    for layer in range(s.layers):
        at, stem = f"/model/layers.{layer}", f"model.layers.{layer}"
        ones = g.weight(f"{stem}.input_norm.weight", 1 + 0.1 * g.random.standard_normal(s.hidden).astype(np.float32))
        normed, x = _norm(g, x, skip, ones, f"{at}/input_norm")
        wide, few = s.heads * s.width, s.groups * s.width
        q, k, v = (
            _product(g, s, normed, f"{stem}.attn.{n}", f"{at}/attn/{n}", s.hidden, w)
            for n, w in (("q", wide), ("k", few), ("v", few))
        )
        caches = [f"past_key_values.{layer}.{n}" for n in ("key", "value")]
        done = g.node(
            "GroupQueryAttention", [q, k, v, *caches, seen, total, cos, sin], f"{at}/attn/GroupQueryAttention", 3, MS,
            num_heads=s.heads, kv_num_heads=s.groups, do_rotary=1, local_window_size=s.window,
        )  # fmt: skip
        outputs += [f"{at}/attn/GroupQueryAttention/output_{i}" for i in (1, 2)]
        o = _product(g, s, done, f"{stem}.attn.o", f"{at}/attn/o", wide, s.hidden)
        ones = g.weight(f"{stem}.post_norm.weight", 1 + 0.1 * g.random.standard_normal(s.hidden).astype(np.float32))
        normed, x = _norm(g, x, o, ones, f"{at}/post_norm")
        skip = _experts(g, s, normed, at, stem)
    ones = g.weight("model.norm.weight", np.ones(s.hidden, np.float32))
    normed, _ = _norm(g, x, skip, ones, "/model/norm")
    g.nodes.append(helper.make_node("MatMul", [normed, g.normal("lm_head.weight", s.hidden, s.vocab)], ["logits"]))
    ids = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "tokens"])
        for n in ("input_ids", "attention_mask")
    ]
    past = [
        helper.make_tensor_value_info(
            f"past_key_values.{i}.{n}", TensorProto.FLOAT, ["batch", s.groups, "past", s.width]
        )
        for i in range(s.layers)
        for n in ("key", "value")
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", s.vocab])
    made = helper.make_graph(g.nodes, "model", [*ids, *past], [logits], g.weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MS, 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def _norm(g: Graph, x: str, skip: str, weight: str, name: str) -> tuple[str, str]:
    """The norm, and the sum that it took."""
    if not skip:
        return g.node("SimplifiedLayerNormalization", [x, weight], f"{name}/LayerNorm", axis=-1, epsilon=1e-6), x
    name = f"{name}/SkipLayerNorm"
    out = g.node("SkipSimplifiedLayerNormalization", [x, skip, weight], name, 4, MS, epsilon=1e-6)
    return out, f"{name}/output_3"


def _product(g: Graph, s: Sizes, x: str, stem: str, at: str, rows: int, columns: int) -> str:
    """MatMul, or MatMulNBits in blocks of 16."""
    if not s.narrow:
        return g.node("MatMul", [x, g.normal(f"{stem}.MatMul.weight", rows, columns)], f"{at}/MatMul")
    w = g.random.standard_normal((1, columns, rows)) * rows**-0.5
    packed, scale, zero = pack(w, s.narrow, 16, s.zeros)
    inputs = [
        x,
        g.weight(f"{stem}.MatMul.weight_Q", packed.reshape(columns, rows // 16, -1)),
        g.weight(f"{stem}.MatMul.weight_scales", scale[0]),
    ]
    inputs += [g.weight(f"{stem}.MatMul.weight_zp", zero[0])] if s.zeros else []
    shape = {"K": rows, "N": columns, "bits": s.narrow, "block_size": 16}
    return g.node("MatMulNBits", inputs, f"{at}/MatMulNBits", 1, MS, **shape)


def _experts(g: Graph, s: Sizes, x: str, at: str, stem: str) -> str:
    router = g.node(
        "MatMul", [x, g.normal(f"{stem}.moe.router.MatMul.weight", s.hidden, s.experts)], f"{at}/moe/router/MatMul"
    )
    rows = g.node("Reshape", [router, g.weight(f"{stem}.rows", np.array([-1, s.experts]))], f"{at}/moe/router/Reshape")
    up = g.random.standard_normal((s.experts, 2 * s.inner, s.hidden)) * s.hidden**-0.5
    down = g.random.standard_normal((s.experts, s.hidden, s.inner)) * s.inner**-0.5
    attrs: dict[str, Any] = {
        "k": s.chosen, "activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": s.normalise,
    }  # fmt: skip
    if s.limit is not None:
        attrs |= {"swiglu_limit": s.limit, "activation_alpha": 1.702, "activation_beta": 1.0}
    biases = ["", ""]
    if s.bias:
        biases = [
            g.normal(f"{stem}.moe.fc{i}.bias", s.experts, w, scale=0.2) for i, w in ((1, 2 * s.inner), (2, s.hidden))
        ]
    if not s.bits:
        weights = [g.weight(f"{stem}.moe.fc{i}.weight", w.astype(np.float32)) for i, w in ((1, up), (2, down))]
        inputs = [x, rows, weights[0], biases[0], weights[1], biases[1]]
        return g.node("MoE", inputs, f"{at}/moe/MoE", 1, MS, **attrs)
    inputs, zeros = [x, rows], []
    for i, (w, bias) in enumerate(zip((up, down), biases, strict=True)):
        packed, scale, zero = pack(w, s.bits, s.block, s.zeros)
        inputs += [
            g.weight(f"{stem}.moe.fc{i + 1}.qweight", packed),
            g.weight(f"{stem}.moe.fc{i + 1}.scales", scale),
            bias,
        ]
        zeros += [g.weight(f"{stem}.moe.fc{i + 1}.zeros", zero)] if s.zeros else []
    inputs += ["", "", "", *zeros] if s.zeros else []
    attrs |= {"expert_weight_bits": s.bits} | ({"block_size": s.block} if s.block else {})
    return g.node("QMoE", inputs, f"{at}/moe/QMoE", 1, MS, **attrs)


def pack(w: Array, bits: int, block: int, zeros: bool = False) -> tuple[Array, Array, Array]:
    """Packed integers of [E, N, K], scales of rows or blocks, and zero points: half of the range, or each its own."""
    most, half = (1 << bits) - 1, 1 << (bits - 1)
    blocks = w.reshape(*w.shape[:2], -1, block or w.shape[2])
    if zeros:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scale = (high - low) / most
        zero = np.round(-low / scale)
    else:
        scale = np.abs(blocks).max(-1) / max(half - 1, 1)
        zero = np.full(scale.shape, half)
    q = np.clip(np.round(blocks / scale[..., None]) + zero[..., None], 0, most).reshape(w.shape)
    if not block:
        scale, zero = scale[..., 0], zero[..., 0]
    return _bytes(q, bits), scale.astype(np.float32), _bytes(zero, bits)


def _bytes(q: Array, bits: int) -> Array:
    """Integers of the last axis, several a byte, low bits first."""
    q = q.astype(np.uint8)
    many = 8 // bits
    q = np.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, -q.shape[-1] % many)])
    out = np.zeros((*q.shape[:-1], q.shape[-1] // many), np.uint8)
    for i in range(many):
        out |= q[..., i::many] << np.uint8(bits * i)
    return out
