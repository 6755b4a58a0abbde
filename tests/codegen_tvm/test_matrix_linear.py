"""Linear kernels against float64: every variant, odd sizes, strides, operands of the epilogue."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matrix_operands import Weight, random_weight, relative_error
from ops_runner import normal, run

from moec.codegen.tvm.formats import BF16, F32, FORMATS, FP8_E4M3, Format
from moec.codegen.tvm.linear import LinearSpec, build, scratch_size
from moec.codegen.tvm.tir import Machine

MACHINE = Machine()
TOLERANCE = 3e-6


def check(spec: LinearSpec, weight: Weight, tokens: int, machine: Machine = MACHINE) -> None:
    """Run on slices of wider rows with scratch full of NaN: nothing may be read before it is written."""
    x, y = normal(tokens, spec.ldx, seed=1), normal(tokens, spec.ldy, seed=2)
    x[:, spec.k :] = torch.nan
    bias = normal(spec.n, seed=3)
    exact = x[:, : spec.k].double() @ weight.values.T
    if spec.bias:
        exact = exact + bias
    if spec.accumulate:
        exact = exact + y[:, : spec.n]
    outside = y[:, spec.n :].clone()
    scratch = torch.full((scratch_size(spec, machine),), torch.nan)
    operands = [x, *weight.operands, *([bias] if spec.bias else []), y, scratch]
    run(build, spec, *operands, tokens, machine=machine)
    assert relative_error(y[:, : spec.n], exact) < TOLERANCE
    assert torch.equal(y[:, spec.n :], outside)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
def test_variants_by_token_count(fmt: Format) -> None:
    n, k = 272, 600
    spec = LinearSpec(n, k, fmt, ldx=k, ldy=n, max_tokens=300)
    weight = random_weight(fmt, n, k)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 64, 299, 300):
        check(spec, weight, tokens)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 5), (130, 257), (1000, 129)])
def test_sizes_that_fill_no_tile(fmt: Format, n: int, k: int) -> None:
    spec = LinearSpec(n, k, fmt, ldx=k + 3, ldy=n + 5, max_tokens=20)
    weight = random_weight(fmt, n, k)
    for tokens in (1, 3, 20):
        check(spec, weight, tokens)


@pytest.mark.parametrize(("bias", "accumulate"), [(True, False), (False, True), (True, True)])
def test_bias_and_accumulation(bias: bool, accumulate: bool) -> None:
    n, k = 100, 77
    spec = LinearSpec(n, k, BF16, k, n + 1, max_tokens=9, bias=bias, accumulate=accumulate)
    for tokens in (1, 9):
        check(spec, random_weight(BF16, n, k), tokens)


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_only_the_reachable_variants_are_generated(max_tokens: int) -> None:
    n, k = 48, 200
    spec = LinearSpec(n, k, FP8_E4M3, k, n, max_tokens)
    names = {h.name for h in build(spec, MACHINE).helpers[0].helpers}
    assert names == {"copy_row", *(f"row_lane_fp8_e4m3_m{m}" for m in range(1, max_tokens + 1))}
    check(spec, random_weight(FP8_E4M3, n, k), max_tokens)


@pytest.mark.parametrize("cores", [1, 2, 7])
def test_any_core_count_covers_all_panels_once(cores: int) -> None:
    """More cores than the machine has, and more than there are panels: the division is by arithmetic alone."""
    machine = replace(MACHINE, cores=cores)
    n, k = 90, 3000
    spec = LinearSpec(n, k, F32, k, n, max_tokens=40, accumulate=True)
    for tokens in (1, 40):
        check(spec, random_weight(F32, n, k), tokens, machine)


@pytest.mark.parametrize("lanes", [4, 16])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
def test_vector_width_of_other_machines(lanes: int, fmt: Format) -> None:
    """LLVM splits or joins the vectors of NEON and AVX-512 machines on this one, so their code paths run too."""
    machine = replace(MACHINE, lanes=lanes, registers=32)
    n, k = 150, 300
    spec = LinearSpec(n, k, fmt, k, n, max_tokens=31)
    for tokens in (1, 3, 31):
        check(spec, random_weight(fmt, n, k), tokens, machine)


def test_equal_specs_share_one_kernel() -> None:
    spec = LinearSpec(64, 64, F32, 64, 64, 4)
    assert build(spec, MACHINE) is build(replace(spec), MACHINE)
    assert build(replace(spec, ldx=65), MACHINE).name != spec.name
