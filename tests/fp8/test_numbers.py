"""Quantisation against torch's casts and published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moec
from moec.ir.accounting import sqnr_db
from moec.ir.accumulate import hopper_product
from moec.ir.logfmt import round_logfmt
from moec.ir.numeric import NumericError, Packed, Quantised, quantise, shard


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale,least", [("f32", 28.5), ("ue8m0", 28.4)])
@pytest.mark.parametrize("k", [512, 4096])
def test_a_product_of_gaussian_data(scale: str, least: float, k: int) -> None:
    """1x128 by 128x128; published: 28.7 dB."""
    x, w = gaussian(256, k), gaussian(512, k, seed=1)
    xq = quantise(x, "fp8_e4m3", (1, 128), scale).dequantise(torch.float64)
    wq = quantise(w, "fp8_e4m3", (128, 128), scale).dequantise(torch.float64)
    assert least <= sqnr_db(x.double() @ w.double().T, xq @ wq.T) < 29.5


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (5, 3)])
@pytest.mark.parametrize("scale", ["f32", "ue8m0"])
def test_bits_are_those_of_torch(shape: tuple[int, int], scale: str) -> None:
    """Data are torch's own cast of x / scale, block by block; scales are amax / 448, powers of two rounded up."""
    x = gaussian(*shape) * torch.logspace(-30, 5, shape[1])
    x[0] = 0
    x[1, 0] = 2.0**-149
    q = quantise(x, "fp8_e4m3", (128, 128), scale)
    for i in range(q.scale.shape[0]):
        for j in range(q.scale.shape[1]):
            rows, columns = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            expected = x[rows, columns].abs().max() / 448
            if scale == "ue8m0":
                expected = torch.tensor(2.0) ** torch.ceil(torch.log2(expected.double())).float()
            assert q.scale[i, j] == expected
            data = (x[rows, columns] / q.scale[i, j]).to(torch.float8_e4m3fn)
            assert torch.equal(q.data[rows, columns].view(torch.uint8), data.view(torch.uint8))


def test_matrices_at_any_byte_of_a_file_are_packed() -> None:
    raw = torch.randint(0, 120, (1 + 32 * 128,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    there = raw[1:].view(torch.float8_e4m3fn).reshape(32, 128)
    packed = [Packed(Quantised(w, torch.ones(1, 1), "fp8_e4m3", (128, 128))).data() for w in (there, there.clone())]
    assert torch.equal(*packed)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_is_quantised_as_the_whole(dim: int) -> None:
    whole = quantise(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), "fp8_e4m3", (4, 4), "ue8m0")
    part = shard(whole, dim, 2, 1, 1)
    assert isinstance(part, Quantised) and (part.format, part.block) == ("ue8m0", (4, 4))
    assert torch.equal(part.dequantise(), whole.dequantise().chunk(2, dim)[1])


def test_zeros_have_scale_one_and_infinities_are_refused() -> None:
    q = quantise(torch.zeros(3, 200), "fp8_e4m3", (1, 128), "ue8m0")
    assert torch.equal(q.scale, torch.ones(3, 2)) and not q.dequantise().any()
    for bad in (torch.inf, -torch.inf, torch.nan):
        with pytest.raises(NumericError, match="infinities or NaN"):
            quantise(torch.tensor([[1.0, bad]]), "fp8_e4m3", (1, 128), "f32")


def test_hopper_loses_two_percent_without_promotion() -> None:
    """K = 4096 of Gaussian data: nearly 2 % of the results' size at worst, as published; a tenth of it promoted."""
    a = quantise(gaussian(48, 4096), "fp8_e4m3", (1, 0), "f32").dequantise()
    b = quantise(gaussian(64, 4096, seed=1), "fp8_e4m3", (0, 0), "f32").dequantise()
    exact = a.double() @ b.double().T
    size = exact.square().mean().sqrt()
    worst = {p: ((hopper_product(a, b, p) - exact).abs().max() / size).item() for p in (False, True)}
    assert 0.015 < worst[False] < 0.025
    assert worst[True] < 0.003


def test_the_evaluator_sums_as_its_target_does() -> None:
    """22 bits on h800 (13 of them fraction), FP32 on b200; without rounding, and on request, in the compute type."""
    from moec.ir import Module
    from moec.ir.evaluate import Evaluator

    plans = {t: moec.trace("tiny-deepseek-v3").optimize(t).ir for t in ("h800", "b200")}
    assert plans["h800"].attrs["accumulate_bits"] == 22 and "accumulate_bits" not in plans["b200"].attrs
    x, w = quantise(gaussian(4, 512), "fp8_e4m3", (1, 128), "f32"), gaussian(8, 512, seed=1).double()

    def product(module: Module, **options: Any) -> torch.Tensor:
        return Evaluator(module, None, torch.float64, **options).product(x, w)  # type: ignore[arg-type]

    exact = x.dequantise(torch.float64) @ w.T
    assert torch.equal(product(plans["b200"]), product(plans["b200"], accumulate="exact"))
    narrow = hopper_product(x.dequantise(torch.float64), w, promote=True).double()
    assert torch.equal(product(plans["h800"]), narrow) and not torch.equal(narrow, exact)
    assert torch.equal(product(plans["h800"], accumulate="exact"), product(plans["h800"], rounding=False))
    error = {
        bits: (hopper_product(x.dequantise(torch.float64), w, True, bits) - exact).abs().max() for bits in (10, 13)
    }
    assert error[10] > 2 * error[13]


def test_promoted_sums_are_exact_where_nothing_is_cut() -> None:
    a, b = torch.randint(0, 3, (4, 300)).float(), torch.randint(0, 3, (5, 300)).float()
    assert torch.equal(hopper_product(a, b, promote=True), a @ b.T)


def test_logfmt_keeps_what_bf16_keeps_within_a_few_db() -> None:
    """Published order on activations: 8 bits beat E4M3 and E5M2, 10 bits come near BF16."""
    x = gaussian(64, 56, 128)
    flat = x.flatten(1)
    fp8 = {d: sqnr_db(flat, quantise(flat, d, (1, 128), "f32").dequantise()) for d in ("fp8_e4m3", "fp8_e5m2")}
    eight, ten = sqnr_db(x, round_logfmt(x, 8)), sqnr_db(x, round_logfmt(x))
    assert eight > max(fp8.values()) and ten > 48


def test_logfmt_ends_zeros_and_range() -> None:
    x = torch.tensor([[0.0, -3.0, 2.0**-40, 5.0, -0.0, 1.0]])
    y = round_logfmt(x)
    assert y[0, 0] == 0 and y[0, 4] == 0 and y[0, 2] == 0  # below 2^-32 of the largest
    torch.testing.assert_close(y[0, [1, 3]], x[0, [1, 3]], rtol=0.022, atol=0)
    assert not round_logfmt(torch.zeros(2, 128)).any()
    torch.testing.assert_close(round_logfmt(torch.full((1, 4), 0.7)), torch.full((1, 4), 0.7))
