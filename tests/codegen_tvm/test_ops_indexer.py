"""Kernels of sparse attention against torch: index scores, the choice of positions with ties, attention over it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from ops_runner import MACHINES, run

from moec.codegen.tvm.cache import CacheLayout
from moec.codegen.tvm.indexer import (
    AppendIndexSpec,
    IndexSpec,
    build_append_index,
    build_index_scores,
    build_index_select,
)
from moec.codegen.tvm.indexer import scratch_elements as work_elements
from moec.codegen.tvm.mla_decode import MlaDecodeSpec, build_mla_decode, scratch_elements
from moec.codegen.tvm.tir import Machine

CONTEXT, TOP = 128, 9


@dataclass(frozen=True)
class Sizes:
    """Widths of latent, rotary key and index key, heads, and positions that are chosen."""

    rank: int = 21
    rope: int = 6
    dim: int = 10
    heads: int = 3
    top: int = TOP

    def layout(self, dtype: str) -> CacheLayout:
        return CacheLayout(self.rank, self.rope, dtype, 2, 64, self.dim)

    def index(self, dtype: str, tokens: int) -> IndexSpec:
        h, d = self.heads, self.dim
        return IndexSpec(self.layout(dtype), h, d, self.top, 0.3, tokens, CONTEXT, h * d, d, h)


SIZES = (Sizes(), Sizes(64, 32, 64, 35, 70))
"""Odd ones; and those that matrix tiles take, with several panels of heads and tiles of chosen keys."""
KINDS = list(product(MACHINES, ("f32", "bf16"), SIZES))


def choice(scores: torch.Tensor, count: int, top: int = TOP) -> list[int]:
    """Positions of the best scores, equal ones by rising position."""
    order = sorted(range(count), key=lambda p: (-float(scores[p]), p))[:top]
    return sorted(order) + [-1] * (top - len(order))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("values", ["few", "many", "signs"])
def test_the_best_scores_are_chosen_ties_by_position(machine: Machine, values: str) -> None:
    generator = torch.Generator().manual_seed(7)
    pos = torch.tensor([0, TOP - 1, TOP, 30, 77, 127], dtype=torch.int32)
    scores = torch.randn(len(pos), CONTEXT, generator=generator)
    if values == "few":
        scores = (scores * 2).round()
    if values == "signs":
        scores = scores.abs().neg() * 1e-30
    expected = [choice(row, int(p) + 1) for row, p in zip(scores + 0.0, pos, strict=True)]
    ids = torch.full((len(pos), TOP), 99, dtype=torch.int32)
    run(build_index_select, Sizes().index("f32", len(pos)), scores, pos, ids, len(pos), machine=machine)
    assert ids.tolist() == expected


@pytest.mark.parametrize(("machine", "dtype", "sizes"), KINDS)
def test_scores_and_attention_over_chosen_positions(machine: Machine, dtype: str, sizes: Sizes) -> None:
    generator = torch.Generator().manual_seed(3)
    element = torch.float32 if dtype == "f32" else torch.bfloat16
    rank, rope, dim, heads, layout = sizes.rank, sizes.rope, sizes.dim, sizes.heads, sizes.layout(dtype)
    cache = torch.randn(4, 64, rank + rope + dim, generator=generator).to(element)
    pages = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    seq = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32)
    pos = torch.tensor([5, 40, 41, 100, 127], dtype=torch.int32)
    count = len(pos)
    keys = torch.randn(count, dim, generator=generator)
    given = (keys, seq, pos, pages, cache)
    run(build_append_index, AppendIndexSpec(layout, dim, count, dim), *given, count, machine=machine)
    rows = [torch.cat([cache[p] for p in pages[s]]).float() for s in seq]
    assert all(torch.equal(r[p, -dim:], k.to(element).float()) for r, p, k in zip(rows, pos, keys, strict=True))
    q = torch.randn(count, heads, dim, generator=generator)
    weights = torch.randn(count, heads, generator=generator)
    scores = torch.full((count, CONTEXT), 7.0)
    spec = sizes.index(dtype, count)
    work = torch.full((work_elements(spec, machine),), float("nan"))
    run(build_index_scores, spec, q, weights, cache, pages, seq, pos, scores, work, count, machine=machine)
    bound = 1e-5 if dtype == "f32" or spec.dim % 32 else 2e-4  # tiles keep 16 bits of the queries
    for t in range(count):
        seen = int(pos[t]) + 1
        if seen <= sizes.top:
            assert bool((scores[t] == 7.0).all()), "a token that sees no more than top_k positions needs no scores"
            continue
        parts = (q[t].double() @ rows[t][:seen, -dim:].double().T * 0.3).relu()
        expected = weights[t].double() @ parts
        size = weights[t].double().abs() @ parts
        assert bool(((scores[t, :seen] - expected).abs() <= bound * (size + 1)).all())
    chosen = torch.tensor([choice(s, int(p) + 1, sizes.top) for s, p in zip(scores, pos, strict=True)]).int()
    latent, turned = (torch.randn(count, heads, n, generator=generator) for n in (rank, rope))
    out = torch.zeros(count, heads, rank)
    shapes = (heads * rank, rank, heads * rope, rope, heads * rank, rank)
    attention = MlaDecodeSpec(heads, layout, 0.4 if rank < 64 else 0.1, count, *shapes, sizes.top)
    scratch = torch.full((scratch_elements(attention, machine),), float("nan"))
    args = (latent, turned, cache, pages, seq, pos, chosen, out, scratch)
    run(build_mla_decode, attention, *args, count, machine=machine)
    for t in range(count):
        keys = rows[t][chosen[t][chosen[t] >= 0].long(), : rank + rope].double()
        logits = torch.cat((latent[t], turned[t]), -1).double() @ keys.T * attention.scale
        expected = logits.softmax(-1) @ keys[:, :rank]
        assert torch.allclose(out[t].double(), expected, atol=1e-5 if rank < 64 or dtype == "f32" else 2e-4)
