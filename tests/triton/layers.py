"""Sequences of kernels against torch, run by worker.py in the interpreter."""

from __future__ import annotations

import torch

from moec.codegen.triton.compose import Chain, Experts, absorbed_attention, routed_experts
from moec.codegen.triton.specs.recipe import quantise_1x128, quantise_128x128, wide, wide_blocks


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def small_experts(generator: torch.Generator, count: int, width: int, inner: int) -> Experts:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    gate_up = quantise_128x128(normal(count, 2 * inner, width) * width**-0.5)
    down = quantise_128x128(normal(count, width, inner) * inner**-0.5)
    router = (normal(count, width) * width**-0.5).bfloat16()
    return Experts(router, 0.1 * normal(count), *gate_up, *down, groups=4, top_groups=2, top_k=3, route_scale=2.5)


def reference_experts(x: torch.Tensor, e: Experts) -> torch.Tensor:
    """Expert by expert in float64; activations are quantised where the kernels quantise them."""
    score = (x.double() @ e.router.double().T).sigmoid()
    choice = score + e.bias
    groups = choice.view(len(x), e.groups, -1)
    best = groups.topk(2, -1).values.sum(-1).topk(e.top_groups, -1).indices
    kept = torch.zeros(len(x), e.groups, dtype=torch.bool).scatter_(1, best, True)
    index = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1).topk(e.top_k, -1).indices
    weight = score.gather(1, index)
    weight = weight / weight.sum(-1, keepdim=True) * e.route_scale
    gate_up, down = wide_blocks(e.gate_up, e.gate_up_scale), wide_blocks(e.down, e.down_scale)
    a = wide(*quantise_1x128(x.float()))
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for k, expert in enumerate(index[t].tolist()):
            gate, up = (gate_up[expert] @ a[t]).chunk(2)
            hidden = wide(*quantise_1x128((torch.nn.functional.silu(gate) * up)[None].float()))[0]
            out[t] += weight[t, k] * (down[expert] @ hidden)
    return out


def experts_error(tokens: int, masked: bool) -> float:
    generator = torch.Generator().manual_seed(tokens)
    experts = small_experts(generator, 8, 256, 128)
    x = torch.randn(tokens, 256, generator=generator).bfloat16()
    chain = Chain("sm_90a", "decode" if masked else "prefill")
    return relative(routed_experts(chain, x, experts, masked), reference_experts(x, experts))


def attention_error(splits: int) -> float:
    """Absorbed decode of two query tokens against torch's attention over the dense keys."""
    generator = torch.Generator().manual_seed(splits)
    lengths = (2, 150)
    cache = torch.randn(8, 64, 576, generator=generator).bfloat16()
    pages = torch.tensor([[5, 0, 0], [7, 1, 3]], dtype=torch.int32)
    q = torch.randn(2, 2, 16, 576, generator=generator).bfloat16()
    length = torch.tensor(lengths, dtype=torch.int32)
    got = absorbed_attention(Chain("sm_90a", "decode"), q, cache, pages, length, 192**-0.5, splits)
    worst = 0.0
    for b, n in enumerate(lengths):
        kv = cache[pages[b].long()].flatten(0, 1)[None, None, :n].double()
        seen = torch.arange(n)[None] <= n - 2 + torch.arange(2)[:, None]
        want = torch.nn.functional.scaled_dot_product_attention(
            q[b].transpose(0, 1)[None].double(), kv.expand(1, 16, -1, -1), kv[..., :512].expand(1, 16, -1, -1),
            attn_mask=seen, scale=192**-0.5,
        )  # fmt: skip
        worst = max(worst, relative(got[b].transpose(0, 1)[None], want))
    return worst
