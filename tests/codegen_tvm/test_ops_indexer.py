"""Kernels of sparse attention against torch: index scores, the choice of positions with ties, attention over it."""

from __future__ import annotations

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
from moec.codegen.tvm.mla_sparse import MlaSparseSpec, build_mla_sparse, scratch_elements
from moec.codegen.tvm.tir import Machine

RANK, ROPE, DIM, HEADS, TOP, CONTEXT = 21, 6, 10, 3, 9, 128
KINDS = list(product(MACHINES, ("f32", "bf16")))


def layout(dtype: str) -> CacheLayout:
    return CacheLayout(RANK, ROPE, dtype, 2, 64, DIM)


def index_spec(dtype: str, tokens: int) -> IndexSpec:
    return IndexSpec(layout(dtype), HEADS, DIM, TOP, 0.3, tokens, CONTEXT, HEADS * DIM, DIM, HEADS)


def choice(scores: torch.Tensor, count: int) -> list[int]:
    """Positions of the best scores, equal ones by rising position."""
    order = sorted(range(count), key=lambda p: (-float(scores[p]), p))[:TOP]
    return sorted(order) + [-1] * (TOP - len(order))


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
    run(build_index_select, index_spec("f32", len(pos)), scores, pos, ids, len(pos), machine=machine)
    assert ids.tolist() == expected


@pytest.mark.parametrize(("machine", "dtype"), KINDS)
def test_scores_and_attention_over_chosen_positions(machine: Machine, dtype: str) -> None:
    generator = torch.Generator().manual_seed(3)
    element = torch.float32 if dtype == "f32" else torch.bfloat16
    cache = torch.randn(4, 64, RANK + ROPE + DIM, generator=generator).to(element)
    pages = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    seq = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    pos = torch.tensor([5, 40, 41, 100], dtype=torch.int32)
    keys = torch.randn(4, DIM, generator=generator)
    given = (keys, seq, pos, pages, cache)
    run(build_append_index, AppendIndexSpec(layout(dtype), DIM, 4, DIM), *given, 4, machine=machine)
    rows = [torch.cat([cache[p] for p in pages[s]]).float() for s in seq]
    assert all(torch.equal(r[p, -DIM:], k.to(element).float()) for r, p, k in zip(rows, pos, keys, strict=True))
    q = torch.randn(4, HEADS, DIM, generator=generator)
    weights = torch.randn(4, HEADS, generator=generator)
    scores = torch.full((4, CONTEXT), 7.0)
    run(build_index_scores, index_spec(dtype, 4), q, weights, cache, pages, seq, pos, scores, 4, machine=machine)
    for t in range(1, 4):
        count = int(pos[t]) + 1
        expected = weights[t] @ (q[t] @ rows[t][:count, -DIM:].T * 0.3).relu()
        assert torch.allclose(scores[t, :count], expected, atol=1e-5)
    assert bool((scores[0] == 7.0).all()), "a token that sees no more than top_k positions needs no scores"
    chosen = torch.tensor([choice(s, int(p) + 1) for s, p in zip(scores, pos, strict=True)], dtype=torch.int32)
    latent, rope = (torch.randn(4, HEADS, n, generator=generator) for n in (RANK, ROPE))
    out = torch.zeros(4, HEADS, RANK)
    spec = MlaSparseSpec(
        HEADS, layout(dtype), 0.4, TOP, 4, HEADS * RANK, RANK, HEADS * ROPE, ROPE, HEADS * RANK, RANK
    )  # fmt: skip
    scratch = torch.zeros(scratch_elements(spec, machine))
    args = (latent, rope, cache, pages, seq, pos, chosen, out, scratch)
    run(build_mla_sparse, spec, *args, 4, machine=machine)
    for t in range(4):
        seen = rows[t][chosen[t][chosen[t] >= 0].long(), : RANK + ROPE].double()
        logits = torch.cat((latent[t], rope[t]), -1).double() @ seen.T * 0.4
        expected = logits.softmax(-1) @ seen[:, :RANK]
        assert torch.allclose(out[t].double(), expected, atol=1e-5)
