"""Latent attention kernels against torch in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from ops_runner import AMX, MACHINE, MACHINES, SERIAL, ints, normal, run

from moec.codegen.tvm import mla_decode, mla_decode_tiles, mla_prefill
from moec.codegen.tvm.cache import CacheLayout
from moec.codegen.tvm.mla_decode import MlaDecodeSpec, build_mla_decode
from moec.codegen.tvm.mla_prefill import MlaPrefillSpec, build_mla_prefill
from moec.codegen.tvm.tir import Machine
from moec.ir.numeric import quantise

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
WIDE = Machine(lanes=16, registers=32, cores=3)
NARROW = Machine(lanes=4, registers=32, cores=1)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance


def cached(layout: CacheLayout, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f64 [n, width] as the cache holds it, and its elements there."""
    if layout.dtype != "fp8":
        stored = rows.to(DTYPES[layout.dtype])
        return stored.double(), stored
    latent, key = rows[:, : layout.kv_rank] * torch.logspace(-1, 1, len(rows))[:, None], rows[:, layout.kv_rank :]
    parts = quantise(latent, "fp8_e4m3", (1, 128), "f32")
    narrow = key.bfloat16()
    data = (parts.data.view(torch.uint8), parts.scale.view(torch.uint8), narrow.contiguous().view(torch.uint8))
    return torch.cat((parts.dequantise(torch.float64), narrow.double()), 1), torch.cat(data, 1)


def decode(
    heads: int,
    layout: CacheLayout,
    lengths: list[int],
    tokens: list[tuple[int, int]],
    machine: Machine = MACHINE,
    magnitude: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel's, reference) outputs for `tokens` of (sequence, position); unused cache is NaN."""
    rank, rope, page = layout.kv_rank, layout.rope_dim, layout.page_size
    keys, stored = zip(
        *(cached(layout, normal(n, layout.width, seed=10 + s)) for s, n in enumerate(lengths)), strict=True
    )
    pages = torch.randperm(len(lengths) * layout.max_pages, generator=torch.Generator().manual_seed(7)).int()
    pages = pages.view(len(lengths), layout.max_pages)
    # What is not in use is NaN in every format.
    unused = 0xFF if layout.dtype == "fp8" else float("nan")
    cache = torch.full((pages.numel(), page, layout.row), unused, dtype=stored[0].dtype)
    for s, k in enumerate(stored):
        for i in range(0, len(k), page):
            part = k[i : i + page]
            cache[int(pages[s, i // page]), : len(part)] = part
    q_latent = normal(len(tokens), heads, rank + 3, seed=1) * magnitude
    q_rope = normal(len(tokens), heads + 1, rope, seed=2) * magnitude
    spec = MlaDecodeSpec(
        heads,
        layout,
        1 / math.sqrt(layout.width),
        max_tokens=len(tokens),
        ld_q_latent=heads * (rank + 3),
        head_q_latent=rank + 3,
        ld_q_rope=(heads + 1) * rope,
        head_q_rope=rope,
        ld_out=heads * (rank + 1),
        head_out=rank + 1,
    )
    out = torch.full((len(tokens), heads, rank + 1), 7.0)
    scratch = torch.full((mla_decode.scratch_elements(spec, machine),), float("nan"))
    seq, pos = ints([s for s, _ in tokens]), ints([p for _, p in tokens])
    run(build_mla_decode, spec, q_latent, q_rope, cache, pages, seq, pos, out, scratch, len(tokens), machine=machine)
    assert torch.all(out[..., rank:] == 7.0)
    expected = []
    for t, (s, p) in enumerate(tokens):
        seen = keys[s][: p + 1]
        query = torch.cat([q_latent[t, :, :rank], q_rope[t, :heads]], dim=-1).double()
        expected.append((query @ seen.T * spec.scale).softmax(-1) @ seen[:, :rank])
    return out[..., :rank], torch.stack(expected)


@pytest.mark.parametrize(
    "heads,layout,machine",
    [
        (4, CacheLayout(32, 16, "f32", 12), MACHINE),
        (16, CacheLayout(512, 64, "bf16", 12), MACHINE),
        (21, CacheLayout(30, 6, "bf16", 48, 16), WIDE),
        (7, CacheLayout(128, 32, "f32", 12), NARROW),
        (5, CacheLayout(128, 16, "fp8", 12), MACHINE),
    ],
)
def test_decode_of_sequences_of_different_lengths(heads: int, layout: CacheLayout, machine: Machine) -> None:
    lengths = [300, 700, 64, 1, 65]
    tokens = [(0, 299), (1, 699), (2, 63), (3, 0), (4, 64), (1, 450)]
    close(*decode(heads, layout, lengths, tokens, machine))


@pytest.mark.skipif(AMX not in MACHINES, reason="no matrix tiles here")
@pytest.mark.parametrize(
    "heads,layout,cores",
    [
        (16, CacheLayout(512, 64, "bf16", 12), 2),
        (1, CacheLayout(32, 32, "bf16", 12), 3),
        (37, CacheLayout(128, 64, "bf16", 12, 128), 5),
        (16, CacheLayout(512, 64, "fp8", 12), 2),
        (21, CacheLayout(128, 64, "fp8", 12), 3),
        (2, CacheLayout(256, 96, "fp8", 12), 1),
    ],
)
def test_decode_on_matrix_tiles(heads: int, layout: CacheLayout, cores: int) -> None:
    """Queries and weights keep 16 bits: a relative error of 2^-17 each."""
    lengths = [300, 700, 64, 1, 65]
    tokens = [(0, 299), (1, 699), (2, 63), (3, 0), (4, 64), (1, 450)]
    assert mla_decode_tiles.fits(layout, AMX)
    close(*decode(heads, layout, lengths, tokens, replace(AMX, cores=cores)), tolerance=3e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 1000])
def test_decode_of_one_token_is_split_over_cores(length: int) -> None:
    close(*decode(16, CacheLayout(128, 32, "f32", 16), [length], [(0, length - 1)], Machine(cores=5)))


def test_decode_survives_large_scores() -> None:
    close(*decode(4, CacheLayout(32, 16, "f32", 16), [500], [(0, 499)], magnitude=100.0), tolerance=3e-5)


def prefill(
    dims: tuple[int, int, int, int], tokens: int, start: int, machine: Machine = MACHINE, magnitude: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel's, reference) outputs; the last row of each head's outputs is a guard."""
    heads, nope, rope, v = dims
    spec = MlaPrefillSpec(
        heads,
        nope,
        rope,
        v,
        1 / math.sqrt(nope + rope),
        max_tokens=256,
        ld_q=heads * (nope + rope + 2),
        head_q=nope + rope + 2,
        ld_kv=heads * (nope + v) + 3,
        head_kv=nope + v,
        ld_rope=rope + 5,
        ld_out=heads * (v + 1),
        head_out=v + 1,
    )
    q = normal(tokens, heads, nope + rope + 2) * magnitude
    kv = normal(start + tokens, heads * (nope + v) + 3, seed=1)
    k_rope = normal(start + tokens, rope + 5, seed=2)
    out = torch.full((tokens, heads, v + 1), 7.0)
    scratch = torch.full((mla_prefill.scratch_elements(spec, machine),), float("nan"))
    run(build_mla_prefill, spec, q, kv, k_rope, out, scratch, tokens, start, machine=machine)
    assert torch.all(out[..., v:] == 7.0)
    expanded = kv[:, : heads * (nope + v)].view(-1, heads, nope + v).double()
    shared = k_rope[:, None, :rope].double().expand(-1, heads, -1)
    keys = torch.cat([expanded[..., :nope], shared], dim=-1)
    scores = torch.einsum("thd,shd->hts", q[..., : nope + rope].double(), keys) * spec.scale
    hidden = torch.arange(start + tokens) > start + torch.arange(tokens)[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return out[..., :v], torch.einsum("hts,shd->thd", weights, expanded[..., nope:])


@pytest.mark.parametrize(
    "dims,tokens,start,machine",
    [
        ((4, 16, 8, 16), 1, 0, MACHINE),
        ((4, 16, 8, 16), 200, 0, MACHINE),
        ((4, 16, 8, 16), 33, 190, MACHINE),
        ((3, 10, 6, 14), 77, 100, MACHINE),
        ((2, 128, 64, 128), 150, 60, MACHINE),
        ((3, 10, 6, 14), 77, 100, WIDE),
        ((3, 10, 6, 14), 130, 5, NARROW),
    ],
)
def test_prefill(dims: tuple[int, int, int, int], tokens: int, start: int, machine: Machine) -> None:
    close(*prefill(dims, tokens, start, machine))


def test_prefill_survives_large_scores() -> None:
    # Scores of several hundred are known to 2e-5 in fp32.
    close(*prefill((4, 16, 8, 16), 100, 20, magnitude=100.0), tolerance=3e-5)


def test_prefill_on_one_core_gives_the_same_bits() -> None:
    whole, _ = prefill((4, 16, 8, 16), 97, 0, SERIAL)
    parallel, _ = prefill((4, 16, 8, 16), 97, 0)
    assert torch.equal(whole, parallel)
