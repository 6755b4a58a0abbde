"""Row-wise kernels (norm, element-wise, embedding, rope) against torch in float64."""

from __future__ import annotations

import pytest
import torch
from ops_runner import SERIAL, ints, normal, run

from moec.codegen.tvm.cache import CacheLayout
from moec.codegen.tvm.elementwise import (
    AddSpec,
    GatherRowsSpec,
    ScaleSpec,
    SwigluSpec,
    build_add,
    build_gather_rows,
    build_scale,
    build_swiglu,
)
from moec.codegen.tvm.embed import EmbedSpec, build_embed
from moec.codegen.tvm.norm import AddRmsNormSpec, RmsNormSpec, build_add_rms_norm, build_rms_norm
from moec.codegen.tvm.rope import RopeSpec, build_rope
from moec.codegen.tvm.tir import Machine
from moec.codegen.tvm.vector import KernelSpecError

EPS = 1e-6


def rms_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.double(), (x.shape[-1],), w.double(), EPS)


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("hidden", [1, 7, 32, 100, 2048])
@pytest.mark.parametrize("tokens", [1, 37])
def test_rms_norm(hidden: int, tokens: int) -> None:
    x, w = normal(tokens, hidden + 3), normal(hidden, seed=1)
    y = torch.full((tokens, hidden + 5), 9.0)
    run(build_rms_norm, RmsNormSpec(hidden, EPS, 64, hidden + 3, hidden + 5), x, w, y, tokens)
    close(y[:, :hidden], rms_norm(x[:, :hidden], w))
    assert torch.all(y[:, hidden:] == 9.0)


def test_rms_norm_in_place_and_of_tiny_values() -> None:
    x, w = normal(4, 96) * 1e-3, normal(96, seed=1)
    expected = rms_norm(x, w)
    run(build_rms_norm, RmsNormSpec(96, EPS, 4, 96, 96), x, w, x, 4)
    close(x, expected)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_rms_norm_at_other_vector_widths(lanes: int) -> None:
    x, w, y = normal(3, 150), normal(150, seed=1), torch.empty(3, 150)
    run(build_rms_norm, RmsNormSpec(150, EPS, 4, 150, 150), x, w, y, 3, machine=Machine(lanes=lanes))
    close(y, rms_norm(x, w))


@pytest.mark.parametrize("hidden", [9, 2048])
@pytest.mark.parametrize("tokens", [1, 37])
def test_add_rms_norm(hidden: int, tokens: int) -> None:
    x, residual, w = normal(tokens, hidden), normal(tokens, hidden, seed=2), normal(hidden, seed=1)
    total, y = torch.empty_like(x), torch.empty_like(x)
    spec = AddRmsNormSpec(hidden, EPS, 64, hidden, hidden, hidden, hidden)
    run(build_add_rms_norm, spec, x, residual, w, total, y, tokens)
    assert torch.equal(total, x + residual)
    close(y, rms_norm(total, w))
    run(build_add_rms_norm, spec, x, residual, w, residual, y, tokens)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("tokens,width", [(1, 5), (40, 1411)])
def test_add_and_scale(tokens: int, width: int) -> None:
    a, b = normal(tokens, width + 2), normal(tokens, width, seed=1)
    expected = a[:, :width] + b
    y = torch.empty(tokens, width)
    run(build_add, AddSpec(width, 64, width + 2, width, width), a, b, y, tokens)
    assert torch.equal(y, expected)
    run(build_add, AddSpec(width, 64, width + 2, width, width), a, b, b, tokens)
    assert torch.equal(b, expected)
    run(build_scale, ScaleSpec(width, 2.5, 64, width, width), y, y, tokens)
    assert torch.equal(y, expected * 2.5)


@pytest.mark.parametrize("tokens,inner", [(1, 3), (1, 1408), (33, 171)])
def test_swiglu(tokens: int, inner: int) -> None:
    x = normal(tokens, 2 * inner) * 8
    y = torch.empty(tokens, inner)
    run(build_swiglu, SwigluSpec(inner, 64, 2 * inner, inner), x, y, tokens)
    gate, up = x.double().chunk(2, dim=-1)
    close(y, torch.nn.functional.silu(gate) * up)


def test_swiglu_of_extreme_gates() -> None:
    gate = torch.tensor([-1e30, -104.0, -88.5, -87.0, -30.0, 0.0, 30.0, 89.0, 1e30, float("inf"), float("nan")])
    x, y = torch.cat([gate, torch.ones(11)]).view(1, 22), torch.empty(1, 11)
    run(build_swiglu, SwigluSpec(11, 1, 22, 11), x, y, 1)
    expected = torch.nn.functional.silu(gate.double())
    torch.testing.assert_close(y[0].double(), expected, rtol=2e-6, atol=1e-35, equal_nan=True)


def test_gather_rows() -> None:
    x, rows, y = normal(10, 37), ints([3, 3, 0, 9, 5]), torch.empty(5, 37)
    run(build_gather_rows, GatherRowsSpec(37, 16, 37, 37), x, rows, y, 5)
    assert torch.equal(y, x[rows.long()])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("hidden", [13, 640])
def test_embed(dtype: str, hidden: int) -> None:
    table = normal(50, hidden).to(torch.float32 if dtype == "f32" else torch.bfloat16)
    ids = ints([49, 0, 7, 7, *range(40)] * 2)
    y = torch.empty(len(ids), hidden)
    run(build_embed, EmbedSpec(hidden, dtype, 128, hidden), ids, table, y, len(ids))
    assert torch.equal(y, table[ids.long()].float())


def rope_table(positions: int, dim: int) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dim", [2, 10, 64])
def test_rope_rotates_pairs_as_complex_numbers(interleaved: bool, dim: int) -> None:
    tokens, heads, nope = 21, 3, 5
    x = normal(tokens, heads, nope + dim)
    table = rope_table(100, dim)
    positions = ints([(7 * t) % 100 for t in range(tokens)])
    pairs = x[..., nope:].double()
    pairs = pairs.reshape(tokens, heads, *((dim // 2, 2) if interleaved else (2, dim // 2)))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    turn = torch.complex(*table[positions.long()].double().chunk(2, dim=-1))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn[:, None])
    expected = (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)
    before = x[..., :nope].clone()
    spec = RopeSpec(heads, dim, interleaved, 64, heads * (nope + dim), nope + dim)
    run(build_rope, spec, x.view(-1)[nope:], table, positions, tokens)
    close(x[..., nope:], expected)
    assert torch.equal(x[..., :nope], before)


def test_kernels_refuse_what_they_cannot_do() -> None:
    with pytest.raises(KernelSpecError, match="embed kernel: elements of fp8_e4m3, can read f32 and bf16"):
        EmbedSpec(64, "fp8_e4m3", 1, 64)
    with pytest.raises(KernelSpecError, match="cache kernel: elements of i8"):
        CacheLayout(32, 16, "i8", 4)
    with pytest.raises(KernelSpecError, match="rotates pairs, not 7 elements"):
        RopeSpec(1, 7, True, 1, 7, 7)


def test_one_core_gives_the_same_bits() -> None:
    x, w, y, z = normal(64, 1000), normal(1000, seed=1), torch.empty(64, 1000), torch.empty(64, 1000)
    spec = RmsNormSpec(1000, EPS, 64, 1000, 1000)
    run(build_rms_norm, spec, x, w, y, 64)
    run(build_rms_norm, spec, x, w, z, 64, machine=SERIAL)
    assert torch.equal(y, z)
