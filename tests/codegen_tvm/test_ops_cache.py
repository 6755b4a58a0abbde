"""The paged latent cache against plain indexing."""

from __future__ import annotations

import pytest
import torch
from ops_runner import ints, normal, run

from moec.codegen.tvm.cache import (
    CacheAppendSpec,
    CacheGatherSpec,
    CacheLayout,
    build_cache_append,
    build_cache_gather,
)
from moec.ir.numeric import quantise

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("kv_rank,rope_dim,page_size", [(32, 16, 64), (30, 6, 16), (512, 64, 64)])
def test_append_then_gather_returns_each_sequence(dtype: str, kv_rank: int, rope_dim: int, page_size: int) -> None:
    lengths, max_pages = [150, 1, 64], 10
    layout = CacheLayout(kv_rank, rope_dim, dtype, max_pages, page_size)
    pages = torch.randperm(30, generator=torch.Generator().manual_seed(1)).int().view(3, max_pages)
    cache = torch.full((30, page_size, layout.width), float("nan"), dtype=DTYPES[dtype])
    tokens = [(s, p) for s, n in enumerate(lengths) for p in range(n)]
    latent, rope_key = normal(len(tokens), kv_rank + 4), normal(len(tokens), rope_dim + 2, seed=1)
    seq, pos = ints([s for s, _ in tokens]), ints([p for _, p in tokens])
    spec = CacheAppendSpec(layout, 256, kv_rank + 4, rope_dim + 2)
    run(build_cache_append, spec, latent, rope_key, seq, pos, pages, cache, len(tokens))

    expected = torch.cat([latent[:, :kv_rank], rope_key[:, :rope_dim]], dim=1).to(DTYPES[dtype]).float()
    assert int(cache.isnan().any(-1).sum()) == 30 * page_size - len(tokens)
    start = 0
    for s, n in enumerate(lengths):
        out = torch.empty(n, layout.width + 3)
        run(build_cache_gather, CacheGatherSpec(layout, 256, layout.width + 3), pages, cache, out, s, n)
        assert torch.equal(out[:, : layout.width], expected[start : start + n])
        start += n


def test_bf16_rounds_like_torch() -> None:
    values = torch.tensor(
        [0.0, -0.0, 1.0 + 2**-8, 1.0 + 2**-8 + 2**-9, 1.0 + 3 * 2**-8, 3.4e38, float("inf"), float("nan"), 1e-40]
    )
    latent = torch.cat([values, normal(1015)]).view(1, 1024)
    layout = CacheLayout(1024, 0, "bf16", 1)
    cache = torch.zeros(1, 64, 1024, dtype=torch.bfloat16)
    zero = ints([0])
    run(build_cache_append, CacheAppendSpec(layout, 1, 1024, 0), latent, latent, zero, zero, zero, cache, 1)
    torch.testing.assert_close(cache[0, 0], latent[0].bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_offsets_past_two_to_the_31_elements() -> None:
    layout = CacheLayout(4, 4, "bf16", 1, 64)
    page = 2**31 // (64 * 8) + 3
    cache = torch.empty(page + 1, 64, 8, dtype=torch.bfloat16)  # untouched memory is never made resident
    latent, rope_key = normal(1, 4), normal(1, 4, seed=1)
    spec = CacheAppendSpec(layout, 1, 4, 4)
    run(build_cache_append, spec, latent, rope_key, ints([0]), ints([5]), ints([page]), cache, 1)
    assert torch.equal(cache[page, 5], torch.cat([latent, rope_key], 1)[0].bfloat16())


@pytest.mark.parametrize("kv_rank,rope_dim", [(128, 16), (512, 64), (256, 6)])
def test_fp8_rows_hold_what_torch_quantises(kv_rank: int, rope_dim: int) -> None:
    """Bytes of a row: E4M3, FP32 scales, BF16 key; and reading them back."""
    layout = CacheLayout(kv_rank, rope_dim, "fp8", 2)
    assert CacheLayout(512, 64, "fp8", 2).row == 656
    latent = normal(70, kv_rank) * torch.logspace(-6, 3, 70)[:, None]
    latent[5] = 0
    rope_key = normal(70, rope_dim, seed=1)
    cache = torch.zeros(2, 64, layout.row, dtype=torch.uint8)
    seq, pos, pages = ints([0] * 70), ints(list(range(70))), ints([1, 0])
    spec = CacheAppendSpec(layout, 128, kv_rank, rope_dim)
    run(build_cache_append, spec, latent, rope_key, seq, pos, pages, cache, 70)
    rows = torch.cat((cache[1], cache[0, :6]))
    expected = quantise(latent, "fp8_e4m3", (1, 128), "f32")
    blocks = kv_rank // 128
    assert torch.equal(rows[:, :kv_rank], expected.data.view(torch.uint8))
    assert torch.equal(rows[:, kv_rank : kv_rank + 4 * blocks].contiguous().view(torch.float32), expected.scale)
    assert torch.equal(rows[:, kv_rank + 4 * blocks :].contiguous().view(torch.bfloat16), rope_key.bfloat16())
    out = torch.empty(70, layout.width)
    run(build_cache_gather, CacheGatherSpec(layout, 128, layout.width), pages, cache, out, 0, 70)
    assert torch.equal(out, torch.cat((expected.dequantise(), rope_key.bfloat16().float()), 1))
