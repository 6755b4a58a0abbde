"""What torch has for the problems of the GPU kernels, on the same arguments: the other columns of benchmarks/gpu.py.

`PEERS` maps a kernel function to (name, maker); a maker takes the instance and its arguments and gives a call to time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moec.codegen.triton.spec import Instance

Call = Callable[[], Any]
Maker = Callable[[Instance, dict[str, Any]], Call]


def compiled(function: Callable[..., Any], *arguments: Any) -> Call:
    """`function` through torch.compile; graphs are captured by the caller, so Inductor makes none."""
    import torch

    fast = torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    return lambda: fast(*arguments)


def operands(x: dict[str, Any]) -> tuple[Any, Any]:
    """A and B of a product."""
    return x["a_ptr"], x["b_ptr"]


def bf16_matmul(i: Instance, x: dict[str, Any]) -> Call:
    import torch

    a, b = (v.to(torch.bfloat16) for v in operands(x))
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
    return lambda: torch.mm(a, b.T, out=out)


def scaled_mm(i: Instance, x: dict[str, Any]) -> Call:
    """One scale for each tensor: less work than block scales ask for, and so an upper bound."""
    import torch

    a, b = operands(x)
    one = torch.ones((), device=a.device)
    rows = -(-a.shape[0] // 16) * 16
    a = torch.nn.functional.pad(a.view(torch.uint8), (0, 0, 0, rows - a.shape[0])).view(a.dtype)
    return lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def expert_loop(i: Instance, x: dict[str, Any]) -> Call:
    """One BF16 product for each expert, rows split evenly."""
    import torch

    parts = x["a_ptr"].to(torch.bfloat16).chunk(len(x["b_ptr"]))
    weights = [w.to(torch.bfloat16).T for w in x["b_ptr"]]
    return lambda: [torch.mm(a, w) for a, w in zip(parts, weights, strict=False)]


def decode_attention(i: Instance, x: dict[str, Any]) -> Call:
    """Dense keys, no page table, no mask; BF16 whatever the cache holds.

    All heads share their keys, so they are given as so many queries of one head: with grouped heads torch would repeat
    the keys for each.
    """
    import torch

    d = i.dims
    batch, heads, queries, width = d["B"], d["HEADS"], d["QUERIES"], d["DV"] + d["DR"]
    q = torch.cat([x["q_ptr"], x["q_rope_ptr"]], -1).view(batch, 1, queries * heads, width)
    k = torch.randn(batch, 1, d["CONTEXT"], width, device=q.device, dtype=q.dtype)
    v = k[..., : d["DV"]]
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, scale=x["softmax_scale"])


def heads_attention(i: Instance, x: dict[str, Any]) -> Call:
    """Dense keys, no page table, no windows or sinks: grouped heads of whole prompts, or of the last queries."""
    import torch

    d = i.dims
    batch, length, queries = d["B"], d["CONTEXT"], d["QUERIES"] or d["CONTEXT"]
    q = x["q_ptr"][: batch * queries].view(batch, queries, d["HEADS"], d["D"]).transpose(1, 2)
    k = torch.randn(batch, d["KV_HEADS"], length, d["D"], device=q.device, dtype=q.dtype)
    v = torch.randn(batch, d["KV_HEADS"], length, d["DV"], device=q.device, dtype=q.dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, scale=x["softmax_scale"], is_causal=queries == length, enable_gqa=True)


def prefill_attention(i: Instance, x: dict[str, Any]) -> Call:
    import torch

    d = i.dims
    batch, heads, length, nope = d["B"], d["HEADS"], d["CONTEXT"], d["DN"]
    q = x["q_ptr"].view(batch, length, heads, -1).transpose(1, 2)
    kv = x["kv_ptr"].view(batch, length, heads, -1).transpose(1, 2)
    rope = x["rope_ptr"].view(batch, 1, length, -1).expand(-1, heads, -1, -1)
    k, v = torch.cat([kv[..., :nope], rope], -1), kv[..., nope:].contiguous()
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, is_causal=True, scale=x["softmax_scale"])


def compiled_route(i: Instance, x: dict[str, Any]) -> Call:
    import torch

    c = {**i.dims, **{n: v for n, v in i.constants.items() if v is not None}}
    groups, kept, top_k = c["NG"], c["TOP_GROUPS"], c["TOP_K"]

    def route(logits: Any, bias: Any) -> Any:
        score = logits.softmax(-1) if c["SOFTMAX"] else logits.sigmoid()
        choice = score if bias is None else score + bias
        if kept < groups:
            parts = choice.unflatten(-1, (groups, -1))
            value = parts.topk(2, -1).values.sum(-1) if c["PAIR_SCORE"] else parts.amax(-1)
            mask = torch.zeros_like(value).scatter_(1, value.topk(kept, -1).indices, 1.0)
            choice = parts.masked_fill(mask[..., None] == 0, -torch.inf).flatten(1)
        index = choice.topk(top_k, -1).indices
        weight = score.gather(1, index)
        return index, weight / weight.sum(-1, keepdim=True) if c["NORMALISE"] else weight

    return compiled(route, x["logit_ptr"], x.get("bias_ptr"))


def compiled_experts(count: int, width: int, inner: int, top_k: int, groups: int, kept: int) -> Callable[[Any], Any]:
    """A layer's routed experts in torch: gate, top-k, a sort, two grouped products, in BF16 through torch.compile."""
    import torch

    def weight(*shape: int) -> Any:
        # In place: beside a model of four layers there is no room for two of these.
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(shape[1] ** -0.5)

    router, gate_up, down = weight(width, count), weight(count, width, 2 * inner), weight(count, inner, width)
    bias = 0.01 * torch.randn(count, device="cuda")

    def layer(x: Any) -> Any:
        score = (x @ router).float().sigmoid()
        parts = (score + bias).unflatten(-1, (groups, -1))
        best = parts.topk(2, -1).values.sum(-1).topk(kept, -1).indices
        mask = torch.zeros(len(x), groups, device=x.device).scatter_(1, best, 1.0)
        index = parts.masked_fill(mask[..., None] == 0, -torch.inf).flatten(1).topk(top_k, -1).indices
        share = score.gather(1, index)
        share = share / share.sum(-1, keepdim=True)
        order = index.flatten().argsort()
        ends = torch.zeros(count, device=x.device).scatter_add_(
            0, index.flatten(), torch.ones_like(order, dtype=torch.float32)
        )
        offsets = ends.cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(x[order // top_k], gate_up, offs=offsets).chunk(2, -1)
        y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, down, offs=offsets)
        y = y * share.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x).index_add_(0, order // top_k, y)

    return torch.compile(layer, mode="max-autotune-no-cudagraphs")


def argmax(i: Instance, x: dict[str, Any]) -> Call:
    return lambda: x["logit_ptr"].argmax(-1)


PEERS: dict[str, tuple[tuple[str, Maker], ...]] = {
    "dense_bf16:dense_bf16": (("torch bf16 mm", bf16_matmul),),
    "dense:dense": (("torch bf16 mm", bf16_matmul), ("torch _scaled_mm per tensor", scaled_mm)),
    "grouped:grouped": (("torch bf16 mm per expert", expert_loop),),
    "masked:masked": (("torch bf16 mm per expert", expert_loop),),
    "attention:mla_decode_split": (("torch SDPA, dense keys", decode_attention),),
    "attention:mla_prefill": (("torch SDPA", prefill_attention),),
    "heads:heads_attention": (("torch SDPA, dense keys", heads_attention),),
    "routing:route": (("torch.compile", compiled_route),),
    "sampling:draw": (("torch argmax", argmax),),
}
