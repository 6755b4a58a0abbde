"""The packed layout and its decoding, against torch's own conversions."""

from __future__ import annotations

import pytest
import torch
from matrix_operands import packed_weight, random_weight
from ops_runner import MACHINES, normal, run

from moec.codegen.tvm.linear import LinearSpec, build, scratch_size
from moec.codegen.tvm.tir import Machine
from moec.ir.lane16 import BF16, FORMATS, FP8_E4M3, MXFP4, Format
from moec.ir.numeric import Packed, Quantised

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def codes_of(fmt: Format, n: int, k: int) -> torch.Tensor:
    """A matrix of distinct-looking stored elements of a format, not zero: int64 bit patterns [3, n, k]."""
    return torch.randint(1, 2 ** min(fmt.bits - 1, 30), (3, n, k), generator=torch.Generator().manual_seed(0))


def packed(codes: torch.Tensor, fmt: Format, scale: torch.Tensor | None = None) -> Packed:
    """Bit patterns as a packed weight."""
    if fmt is MXFP4:
        values = torch.tensor(E2M1)[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
        scales = torch.ones(*codes.shape[:-1], -(-codes.shape[-1] // 32)) if scale is None else scale
        return Packed(Quantised(values, scales, fmt.name, (1, 32)))
    if fmt is FP8_E4M3:
        blocks = (-(-codes.shape[-2] // 128), -(-codes.shape[-1] // 128))
        scales = torch.ones(*codes.shape[:-2], *blocks) if scale is None else scale
        stored = codes.to(torch.uint8).view(torch.float8_e4m3fn)
        return Packed(Quantised(stored, scales, fmt.name, (128, 128)))
    words = codes.to(torch.int16).view(torch.bfloat16) if fmt is BF16 else codes.to(torch.int32).view(torch.float32)
    return Packed(words)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 128), (33, 130), (100, 77)])
def test_layout_puts_each_element_where_the_docstring_says(fmt: Format, n: int, k: int) -> None:
    codes = codes_of(fmt, n, k)
    lanes = packed(codes, fmt).data()
    assert lanes.shape == (3, *fmt.shape(n, k)) and lanes.dtype == torch.int32
    q = fmt.per_lane
    shifts = torch.arange(q) * fmt.bits
    elements = (lanes.long()[..., None] >> shifts) & (2**fmt.bits - 1)
    unpacked = elements.permute(0, 1, 3, 2, 4).reshape(3, lanes.shape[1] * 16, lanes.shape[2] * q)
    assert torch.equal(unpacked[:, :n, :k], codes)
    assert not unpacked[:, n:].any() and not unpacked[:, :, k:].any()


def test_scales_repeat_for_each_tile_of_their_block() -> None:
    n, k = 300, 200
    scales = torch.arange(6.0).reshape(3, 2)
    tiles = packed(torch.zeros(n, k, dtype=torch.int64), FP8_E4M3, scales).scales()
    assert tiles is not None and tiles.shape == FP8_E4M3.scale_shape(n, k)
    assert [float(t) for t in tiles[:, 1]] == [scales[16 * i // 128, 1] for i in range(len(tiles))]


def test_row_scales_are_exponents_in_the_order_of_the_rows() -> None:
    n, k = 40, 96
    scales = torch.exp2(torch.randint(-60, 60, (n, 3)).float())
    stored = packed(torch.ones(n, k, dtype=torch.int64), MXFP4, scales).scales()
    assert stored is not None and stored.shape == MXFP4.scale_shape(n, k) and stored.dtype == torch.uint8
    rows = stored.permute(0, 2, 1).reshape(-1, 4)
    assert torch.equal(torch.exp2(rows[:n, :3].float() - 127), scales)


@pytest.mark.parametrize("tokens", [1, 2, 6, 9])
@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_every_finite_e4m3_value_is_exact(tokens: int, machine: Machine) -> None:
    """A unit vector picks out one column: all finite codes, subnormals and both zeros, in every byte of a lane."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    n, k = 254, 4
    weight = torch.stack([codes.roll(i) for i in range(k)], 1)
    operands = packed_weight(packed(weight.long(), FP8_E4M3)).operands
    spec = LinearSpec(n, k, FP8_E4M3, k, n, max_tokens=9)
    scratch = torch.zeros(scratch_size(spec, machine))
    for column in range(k):
        x = torch.zeros(tokens, k)
        x[:, column] = 1
        y = normal(tokens, n)
        run(build, spec, x, *operands, y, scratch, tokens, machine=machine)
        exact = weight[:, column].contiguous().view(torch.float8_e4m3fn).float()
        assert torch.equal(y, exact.expand(tokens, n))


@pytest.mark.parametrize("tokens", [1, 2, 6, 9, 32])
@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_e4m3_is_exact_where_no_number_is_subnormal_and_where_one_is(tokens: int, machine: Machine) -> None:
    """Kernels may widen the one and the other in different ways, tile by tile."""
    n, k = 64, 32
    codes = torch.tensor([c for c in range(256) if c & 0x78 > 0 and c & 0x7F != 0x7F])
    weight = torch.stack([codes.roll(-7 * i)[:n] for i in range(k)], 1)
    weight[20, 11], weight[50, 31], weight[63, 0] = 0x01, 0x85, 0x80
    operands = packed_weight(packed(weight, FP8_E4M3)).operands
    spec = LinearSpec(n, k, FP8_E4M3, k, n, max_tokens=32)
    scratch = torch.zeros(scratch_size(spec, machine))
    exact = weight.to(torch.uint8).view(torch.float8_e4m3fn).float().T
    for first in range(0, k, tokens):
        x = torch.eye(k).roll(-first, 0)[:tokens].contiguous()
        y = normal(tokens, n)
        run(build, spec, x, *operands, y, scratch, tokens, machine=machine)
        assert torch.equal(y, exact.roll(-first, 0)[:tokens])


@pytest.mark.parametrize("tokens", [1, 2, 6, 9])
@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_every_mxfp4_value_and_scale_is_exact(tokens: int, machine: Machine) -> None:
    """All 16 codes in every place of a lane, with scales from 2^-100 to 2^100."""
    n, k = 48, 40
    codes = torch.stack([torch.arange(n).roll(i) % 16 for i in range(k)], 1)
    scales = torch.exp2(torch.linspace(-100, 100, 2 * n).round()).reshape(n, 2)
    weight = packed_weight(packed(codes, MXFP4, scales))
    spec = LinearSpec(n, k, MXFP4, k, n, max_tokens=9)
    scratch = torch.zeros(scratch_size(spec, machine))
    for column in range(k):
        x = torch.zeros(tokens, k)
        x[:, column] = 1
        y = normal(tokens, n)
        run(build, spec, x, *weight.operands, y, scratch, tokens, machine=machine)
        assert torch.equal(y.double(), weight.values[:, column].expand(tokens, n))


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_what_is_no_number_shows_in_the_result(odd: float, machine: Machine) -> None:
    """Integers would hide it."""
    n, k = 48, 96
    weight = random_weight(MXFP4, n, k)
    spec = LinearSpec(n, k, MXFP4, k, n, max_tokens=9)
    scratch = torch.zeros(scratch_size(spec, machine))
    for tokens in (1, 4):
        x, y = normal(tokens, k), normal(tokens, n)
        x[0, 70] = odd
        run(build, spec, x, *weight.operands, y, scratch, tokens, machine=machine)
        weighed = weight.values[:, 70] != 0
        assert not y[0, weighed].isfinite().any()
        assert y[1:].isfinite().all()


def test_a_large_number_costs_its_block_at_most_a_millionth() -> None:
    n, k = 32, 256
    weight = random_weight(MXFP4, n, k)
    spec = LinearSpec(n, k, MXFP4, k, n, max_tokens=9)
    x, y = normal(1, k), normal(1, n)
    x[0, 40] = 1e4
    run(build, spec, x, *weight.operands, y, torch.zeros(scratch_size(spec, MACHINES[-1])), 1, machine=MACHINES[-1])
    largest = weight.values[:, 32:64].abs().amax(1)
    error = (y.double() - x.double() @ weight.values.T).abs()[0]
    assert (error <= 32 * 1e4 * 2.0**-20 * largest + 1e-6 * (x.double().abs() @ weight.values.abs().T)[0]).all()
