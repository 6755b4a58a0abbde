"""Operators that hold several steps of a transformer: attention, rotary embeddings, norms with their residual sum.

Standard ones of operator set 23 (https://onnx.ai/onnx/operators) and those of onnxruntime's domain `com.microsoft`
(docs/ContribOperators.md of microsoft/onnxruntime), written out as modules of torch write them. Caches are empty: the
graph is run as a whole prompt.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moec.frontend.onnx_import.pieces import Unsupported
from moec.frontend.onnx_import.standard import Op, rms_norm
from moec.frontend.onnx_import.values import Call, number, tensor


def skip_rms_norm(c: Call, x: Any, skip: Any, weight: Any, bias: Any = None) -> Any:
    """RMS norm of a sum, which is the last result."""
    total = x + skip
    if bias is not None:
        raise Unsupported("a bias within a residual sum")
    return rms_norm(c, total, weight), None, None, total


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[1, T, h·d] or [1, h, T, d] as [1, h, T, d]."""
    return x if x.ndim == 4 else x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [1, h, T, d] turned by angles [T, r/2], the first r elements of each head: halves, or pairs side by side."""
    dims = 2 * int(cos.shape[-1])
    part = x if dims == x.shape[-1] else torch.ops.aten.slice.Tensor(x, 3, 0, dims)
    if interleaved:
        cos, sin = (torch.stack((a, a), -1).flatten(-2)[None, None] for a in (cos, sin))
        even, odd = (torch.ops.aten.slice.Tensor(part, 3, i, (1 << 63) - 1, 2) for i in (0, 1))
        turned = torch.stack((-odd, even), -1).flatten(-2)
    else:
        cos, sin = (torch.cat((a, a), -1)[None, None] for a in (cos, sin))
        first = torch.ops.aten.slice.Tensor(part, 3, 0, dims // 2)
        second = torch.ops.aten.slice.Tensor(part, 3, dims // 2, (1 << 63) - 1)
        turned = torch.cat((-second, first), -1)
    out = part * cos + turned * sin
    return out if part is x else torch.cat((out, torch.ops.aten.slice.Tensor(x, 3, dims, (1 << 63) - 1)), -1)


def angles(frequencies: torch.Tensor, scale: Any, length: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [T, r/2] of all positions."""
    turned = torch.arange(length)[:, None].float() * frequencies
    cos, sin = turned.cos(), turned.sin()
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rotary(c: Call, x: Any, *rest: Any) -> Any:
    """RotaryEmbedding: of operator set 23 (x, cos, sin, positions) and of onnxruntime (x, positions, cos, sin).

    The importer has put frequencies and scale into the places of the two tables.
    """
    ours = c.step.domain == "com.microsoft"
    cos, sin = (rest[1], rest[2]) if ours else (rest[0], rest[1])
    if c.attr("scale", 1.0) != 1.0:
        raise Unsupported("a scale of its own")
    flat = x.ndim == 3
    count = c.attr("num_heads", 0)
    if flat and not count:
        width = 2 * int(cos.shape[-1])
        count = int(x.shape[-1]) // width
    wide = heads(x, count)
    tables = angles(cos, number(sin), wide.shape[2])
    out = rotate(wide, *tables, interleaved=bool(c.attr("interleaved", 0)))
    return out.transpose(1, 2).reshape(x.shape) if flat else out


def grouped_query(c: Call, q: Any, k: Any = None, v: Any = None, *rest: Any) -> Any:
    """GroupQueryAttention of onnxruntime, causal, over the prompt itself."""
    slots = [*rest, *[None] * (14 - len(rest))]
    _, _, _, _, cos, sin, _, bias, sinks = slots[:9]
    count, groups = c.attr("num_heads"), c.attr("kv_num_heads")
    if c.attr("softcap", 0.0) or c.attr("smooth_softmax", 0) or not c.attr("causal", 1) or bias is not None:
        raise Unsupported("attention with bounded scores, a bias, or another mask")
    if sinks is not None or any(s is not None for s in slots[9:]):
        raise Unsupported("attention with sinks, norms or quantised caches of its own")
    if k is None:
        width = int(q.shape[-1]) // (count + 2 * groups)
        q, k, v = torch.split(q, [count * width, groups * width, groups * width], -1)
    q, k, v = heads(q, count), heads(k, groups), heads(v, groups)
    if c.attr("do_rotary", 0):
        tables = angles(cos, number(sin), q.shape[2])
        interleaved = bool(c.attr("rotary_interleaved", 0))
        q, k = rotate(q, *tables, interleaved=interleaved), rotate(k, *tables, interleaved=interleaved)
    scale = c.attr("scale", 0.0) or int(q.shape[-1]) ** -0.5
    window = c.attr("local_window_size", -1)
    return attend(q, k, v, scale, window if window > 0 else None)


def attend(q: Any, k: Any, v: Any, scale: float, window: int | None) -> torch.Tensor:
    """Causal attention [1, T, h·d], a query seeing the `window` last positions with its own."""
    length = q.shape[2]
    rows = torch.arange(length)
    distance = rows[:, None] - rows
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(q, k, v, mask[None, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(out.shape[0], length, -1)


def attention(c: Call, q: Any, k: Any, v: Any, mask: Any = None, *past: Any) -> Any:
    """Attention of operator set 23: on [1, h, T, d], or [1, T, h·d] with the numbers of heads as attributes."""
    if c.attr("softcap", 0.0) or c.attr("qk_matmul_output_mode", 0):
        raise Unsupported("attention with bounded scores")
    flat = q.ndim == 3
    if flat:
        q, k, v = heads(q, c.attr("q_num_heads")), *(heads(x, c.attr("kv_num_heads")) for x in (k, v))
    causal = bool(c.attr("is_causal", 0))
    scale = c.attr("scale") or int(q.shape[-1]) ** -0.5
    given = None if mask is None else tensor(mask)
    many = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, given, is_causal=causal, scale=scale, enable_gqa=many)
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1) if flat else out


FUSED: dict[tuple[str, str], Op] = {
    ("", "Attention"): attention,
    ("", "RotaryEmbedding"): rotary,
    ("", "SimplifiedLayerNormalization"): rms_norm,
    ("com.microsoft", "SimplifiedLayerNormalization"): rms_norm,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): skip_rms_norm,
    ("com.microsoft", "RotaryEmbedding"): rotary,
    ("com.microsoft", "GroupQueryAttention"): grouped_query,
}
