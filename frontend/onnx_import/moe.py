"""onnxruntime's mixture of experts, `com.microsoft` MoE and QMoE, in the batched form that is raised to experts.

docs/ContribOperators.md of microsoft/onnxruntime: the k best of softmax(router_probs), then fc2(act(fc1 x) · fc3 x).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moec.frontend.onnx_import.pieces import Unsupported
from moec.frontend.onnx_import.values import Call

HUGE = 3.0e38
"""A bound that bounds nothing."""
WIDTHS = (2, 4, 8)
"""Bits of packed integers."""


def prepare(call: Call, inputs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Weights of one node as [gate and up, its bias, down, its bias], unpacked, fc3 joined to fc1.

    Done before the graph runs. `inputs`: those behind `router_probs`. Raises Unsupported.
    """
    quantised = call.step.op == "QMoE"
    slots = [*inputs, *[None] * (18 - len(inputs))]
    if quantised:
        if call.attr("quant_type", "int") != "int" or call.attr("weights_prepacked", 0) not in (0, -1):
            raise Unsupported("experts quantised otherwise than to integers in rows")
        if any(s is not None for s in slots[12:]):
            raise Unsupported("weights of its own for the router's choice, or scales of activations")
        (w1, s1, b1, w2, s2, b2, w3, s3, b3, z1, z2, z3) = slots[:12]
        w1, w2, w3 = (_unpacked(call, n, w, s, z) for n, w, s, z in ((1, w1, s1, z1), (2, w2, s2, z2), (3, w3, s3, z3)))
    else:
        (w1, b1, w2, b2, w3, b3) = slots[:6]
    if w1 is None or w2 is None:
        raise Unsupported("experts whose weights are not constants")
    if w3 is not None:
        if b3 is not None and b1 is None:
            b1 = torch.zeros(w1.shape[:2])
        w1, b1 = torch.cat((w1, w3), 1), None if b1 is None else torch.cat((b1, _or_zeros(b3, w3)), 1)
    if b1 is not None or b2 is not None:
        b1, b2 = _or_zeros(b1, w1), _or_zeros(b2, w2)
    if w1.shape[1] != 2 * w2.shape[2] or w1.shape[2] != w2.shape[1]:
        raise Unsupported(f"experts of fc1 {list(w1.shape)} and fc2 {list(w2.shape)}: no gate and up")
    return [w1, b1, w2, b2]


def _or_zeros(bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros(weight.shape[:2], dtype=weight.dtype) if bias is None else bias


def _unpacked(
    call: Call, number: int, w: torch.Tensor | None, scale: torch.Tensor | None, zero: torch.Tensor | None
) -> torch.Tensor | None:
    """(q - zero) · scale with q of 2, 4 or 8 bits, the first element of a byte in its low bits."""
    if w is None:
        return None
    bits = call.attr(f"fc{number}_expert_weight_bits", call.attr("expert_weight_bits", 4))
    if scale is None or bits not in WIDTHS or w.dtype != torch.uint8:
        raise Unsupported(f"experts of {bits} bits as {str(w.dtype).removeprefix('torch.')}")
    return unpack(w, scale, zero, bits)


def unpack(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Rows [..., N, K] of packed integers in blocks along K; scales and zeros [..., N] or [..., N, blocks].

    Zeros are packed as the weights are, or numbers.
    """
    q = _apart(w, bits)
    s = (scale.unsqueeze(-1) if scale.ndim < q.ndim else scale).float()
    if zero is None:
        z = torch.full_like(s, float(1 << (bits - 1)))
    else:
        z = zero.float() if zero.is_floating_point() else _apart(zero, bits).float()
        z = z.unsqueeze(-1)[..., : s.shape[-2], :] if z.ndim < s.ndim else z[..., : s.shape[-1]]
    blocks = q.float().reshape(*q.shape[:-1], s.shape[-1], -1)
    return torch.flatten((blocks - z[..., None]) * s[..., None], -2)


def _apart(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers of bytes that hold several, low bits first."""
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], -1).flatten(-2)


def run(c: Call, x: Any, router: Any, gate_up: Any, b1: Any, down: Any, b2: Any) -> torch.Tensor:
    """The experts of each token, weighted by the router: x [..., H], router [T, E]. Raises Unsupported."""
    if c.attr("use_sparse_mixer", 0):
        raise Unsupported("a sparse mixer's choice")
    k, width = int(c.attr("k", 1)), int(x.shape[-1])
    rows = x.reshape(-1, width)
    weights, ids = torch.topk(torch.softmax(router, -1), k, -1)
    if c.attr("normalize_routing_weights", 0):
        weights = weights / weights.sum(-1, keepdim=True)
    chosen = ids.reshape(-1)
    wide = torch.bmm(gate_up[chosen], rows.repeat_interleave(k, 0).unsqueeze(-1)).squeeze(-1)
    wide = wide if b1 is None else wide + b1[chosen]
    out = torch.bmm(down[chosen], _activated(c, wide).unsqueeze(-1)).squeeze(-1)
    out = out if b2 is None else out + b2[chosen]
    done: torch.Tensor = (out * weights.reshape(-1, 1)).view(rows.shape[0], k, width).sum(1).reshape(x.shape)
    return done


def _activated(c: Call, wide: Any) -> Any:
    """act(gate) · up of rows that hold both."""
    name, fusion = c.attr("activation_type", "relu"), c.attr("swiglu_fusion", 0)
    end = (1 << 63) - 1
    if fusion == 1 and name == "swiglu":
        gate, up = (torch.ops.aten.slice.Tensor(wide, 1, i, end, 2) for i in (0, 1))
    else:
        gate, up = wide.chunk(2, -1)
    match name:
        case "silu":
            return F.silu(gate) * up
        case "gelu":
            return F.gelu(gate) * up
        case "relu":
            return F.relu(gate) * up
        case "swiglu" if not c.attr("swiglu_limit_after_activation", 0):
            limit = c.attr("swiglu_limit")
            alpha, beta = c.attr("activation_alpha", 1.0), c.attr("activation_beta", 0.0)
            if limit is None and (alpha, beta) == (1.0, 0.0):
                return F.silu(gate) * up
            bound = HUGE if limit is None else float(limit)
            g, u = torch.clamp(gate, None, bound), torch.clamp(up, -bound, bound)
            return (u + beta) * (g * torch.sigmoid(g * alpha))
    raise Unsupported(f"experts with {name}")
