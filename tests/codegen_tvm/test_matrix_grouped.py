"""Grouped and per-head kernels, sorting and combining, against float64."""

from __future__ import annotations

import pytest
import torch
from matrix_operands import compiled_together, random_weight, relative_error
from ops_runner import normal, run

from moec.codegen.tvm.grouped import GroupedSpec, HeadwiseSpec, build_grouped, build_headwise, scratch_size
from moec.codegen.tvm.moe import CombineSpec, SortSpec, build_combine, build_sort
from moec.codegen.tvm.tir import Machine
from moec.ir.lane16 import FORMATS, FP8_E4M3, Format

MACHINE = Machine()
TOLERANCE = 3e-6
HEAD_SIZES = ((64, 24), (24, 64))


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("gather", [False, True])
def test_groups_of_every_size(fmt: Format, gather: bool) -> None:
    n, k, groups = 50, 140, 9
    weight = random_weight(fmt, groups, n, k)
    specs = tuple(
        GroupedSpec(groups, n, k, f, k + 2, n + 3, 400, gather=g) for f in FORMATS.values() for g in (True, False)
    )
    spec = next(s for s in specs if s.fmt is fmt and s.gather is gather)
    kernel = compiled_together(build_grouped, specs, MACHINE)[spec]
    for counts in ([1, 0, 2, 0, 0, 3, 4, 0, 1], [5, 0, 300, 1, 7, 0, 0, 11, 2], [0] * 8 + [1], [0] * 9):
        rows = sum(counts)
        index = torch.randint(0, 30, (rows,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
        x = normal(30 if gather else max(rows, 1), spec.ldx)
        y = normal(max(rows, 1), spec.ldy, seed=1)
        before = y.clone()
        inputs = x[index.long()] if gather else x[:rows]
        exact = torch.zeros(rows, n, dtype=torch.float64)
        start = 0
        for g, count in enumerate(counts):
            exact[start : start + count] = inputs[start : start + count, :k].double() @ weight.values[g].T
            start += count
        scratch = torch.full((scratch_size(spec, MACHINE),), torch.nan)
        kernel(x, *([index] if gather else []), offsets_of(counts), *weight.operands, y, scratch)
        if rows:
            assert relative_error(y[:rows, :n], exact) < TOLERANCE
        assert torch.equal(y[:rows, n:], before[:rows, n:]) and torch.equal(y[rows:], before[rows:])


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize(("n", "k"), HEAD_SIZES)
def test_heads_of_strided_rows(fmt: Format, n: int, k: int) -> None:
    """Both absorbed products, q_nope -> latent and latent -> v; other columns lie between the heads."""
    heads, hx, hy = 5, k + 8, n + 2
    weight = random_weight(fmt, heads, n, k)
    specs = tuple(
        HeadwiseSpec(heads, a, b, f, heads * (b + 8), b + 8, heads * (a + 2), a + 2, max_tokens=50)
        for f in FORMATS.values()
        for a, b in HEAD_SIZES
    )
    spec = next(s for s in specs if s.fmt is fmt and s.n == n)
    kernel = compiled_together(build_headwise, specs, MACHINE)[spec]
    for tokens in (1, 4, 50):
        x, y = normal(tokens, heads, hx), normal(tokens, heads, hy, seed=1)
        outside = y[..., n:].clone()
        exact = torch.einsum("thk,hnk->thn", x[..., :k].double(), weight.values)
        scratch = torch.full((scratch_size(spec, MACHINE),), torch.nan)
        kernel(x, *weight.operands, y, scratch, tokens)
        assert relative_error(y[..., :n], exact) < TOLERANCE
        assert torch.equal(y[..., n:], outside)


def choices(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Distinct random experts per token."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    return scores.topk(top_k).indices.to(torch.int32)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 8), (1, 256, 8), (37, 16, 3), (100, 5, 1)])
def test_sort_by_expert(tokens: int, experts: int, top_k: int) -> None:
    ids = choices(tokens, experts, top_k)
    rows = tokens * top_k
    offsets = torch.full((experts + 1,), -1, dtype=torch.int32)
    row_token, row_of = torch.empty(rows, dtype=torch.int32), torch.empty(rows, dtype=torch.int32)
    run(build_sort, SortSpec(experts, top_k), ids, offsets, row_token, row_of, tokens)
    order = ids.flatten().sort(stable=True).indices
    assert torch.equal(offsets, offsets_of(torch.bincount(ids.flatten(), minlength=experts).tolist()))
    assert torch.equal(row_token.long(), order // top_k)
    assert torch.equal(order[row_of.long()], torch.arange(rows))


@pytest.mark.parametrize(("tokens", "hidden", "top_k"), [(1, 64, 2), (3, 1030, 8), (50, 513, 6)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_combine(tokens: int, hidden: int, top_k: int, shared: bool, residual: bool) -> None:
    rows = tokens * top_k
    y, weights = normal(rows, hidden + 1), normal(tokens, top_k, seed=1)
    row_of = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    added = [normal(tokens, hidden + 2, seed=2)] * shared + [normal(tokens, hidden + 3, seed=3)] * residual
    out = normal(tokens, hidden + 4, seed=4)
    spec = CombineSpec(hidden, top_k, hidden + 1, hidden + 4, (hidden + 2) * shared, (hidden + 3) * residual)
    run(build_combine, spec, y, row_of, weights, *added, out, tokens)
    chosen = y[row_of.long(), :hidden].double().view(tokens, top_k, hidden)
    exact = (chosen * weights.double()[..., None]).sum(1) + sum(a[:, :hidden].double() for a in added)
    assert relative_error(out[:, :hidden], exact) < TOLERANCE
    assert torch.equal(out[:, hidden:], normal(tokens, hidden + 4, seed=4)[:, hidden:])


def test_a_whole_expert_layer() -> None:
    """Sort, gathered product, combine: the same as a dense sum over each token's experts."""
    tokens, experts, top_k, hidden, width = 40, 12, 4, 96, 80
    ids, weights, x = choices(tokens, experts, top_k), normal(tokens, top_k, seed=5), normal(tokens, hidden)
    weight = random_weight(FP8_E4M3, experts, width, hidden)
    rows = tokens * top_k
    offsets = torch.empty(experts + 1, dtype=torch.int32)
    row_token, row_of = torch.empty(rows, dtype=torch.int32), torch.empty(rows, dtype=torch.int32)
    run(build_sort, SortSpec(experts, top_k), ids, offsets, row_token, row_of, tokens)
    spec = GroupedSpec(
        experts, width, hidden, FP8_E4M3, hidden, width, max_rows=rows, max_group_rows=tokens, gather=True
    )
    y, scratch = torch.empty(rows, width), torch.empty(scratch_size(spec, MACHINE))
    run(build_grouped, spec, x, row_token, offsets, *weight.operands, y, scratch)
    out = torch.empty(tokens, width)
    run(build_combine, CombineSpec(width, top_k, width, width), y, row_of, weights, out, tokens)
    each = torch.einsum("tk,tjnk->tjn", x.double(), weight.values[ids.long()])
    assert relative_error(out, (each * weights.double()[..., None]).sum(1)) < TOLERANCE
