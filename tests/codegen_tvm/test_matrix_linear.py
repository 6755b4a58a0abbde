"""Linear kernels against float64: every variant, odd sizes, strides, operands of the epilogue."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from matrix_operands import compiled_together, random_weight, relative_error
from ops_runner import MACHINES, normal, program

from moec.codegen.tvm.blocking import blocking
from moec.codegen.tvm.gemm import panel_product
from moec.codegen.tvm.linear import LinearSpec, build, scratch_size
from moec.codegen.tvm.tir import Machine, build_module, compile_module
from moec.ir.lane16 import BF16, F32, FORMATS, FP8_E4M3, FP8_E4M3_ROWS

MACHINE = Machine()
TOLERANCE = 3e-6
TILE_TOLERANCE = 1e-5
"""Pairs of BF16 numbers keep 16 bits of an activation."""
ODD_SIZES = ((1, 1), (17, 5), (130, 257), (1000, 129))
STORED = (*FORMATS.values(), FP8_E4M3_ROWS)
SPECS = (
    *(LinearSpec(272, 600, fmt, ldx=600, ldy=272, max_tokens=600) for fmt in STORED),
    *(LinearSpec(n, k, fmt, k + 3, n + 5, max_tokens=20) for fmt in STORED for n, k in ODD_SIZES),
    *(LinearSpec(100, 77, BF16, 77, 101, 20, b, a) for b, a in ((True, False), (False, True), (True, True))),
)


def check(spec: LinearSpec, specs: tuple[LinearSpec, ...], tokens: int, machine: Machine = MACHINE) -> None:
    """Run on slices of wider rows with scratch full of NaN: nothing may be read before it is written."""
    weight = random_weight(spec.fmt, spec.n, spec.k)
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
    compiled_together(build, specs, machine)[spec](*operands, tokens)
    tiled = machine.tiles and spec.fmt is not F32
    assert relative_error(y[:, : spec.n], exact) < (TILE_TOLERANCE if tiled else TOLERANCE)
    assert torch.equal(y[:, spec.n :], outside)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_every_path_and_sizes_that_fill_no_tile(spec: LinearSpec, machine: Machine) -> None:
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 20):
        check(spec, SPECS, tokens, machine)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
@pytest.mark.parametrize("spec", SPECS[: len(STORED)], ids=lambda s: s.name)
def test_more_rows_than_a_block(spec: LinearSpec, machine: Machine) -> None:
    for tokens in (269, 271, 600):
        check(spec, SPECS, tokens, machine)


def test_only_the_reachable_paths_are_generated() -> None:
    specs = tuple(LinearSpec(48, 200, FP8_E4M3, 200, 48, most) for most in (1, 3))
    for spec in specs:
        helpers, names = [build(spec, MACHINE)], set()
        while helpers:
            kernel = helpers.pop()
            names.add(kernel.name)
            helpers += kernel.helpers
        reachable = {f"row_tiles_fp8_e4m3_m{m}" for m in range(1, spec.max_tokens + 1)}
        assert {n for n in names if not n.startswith(("matrix", "linear"))} == {"copy_row", *reachable}
        check(spec, specs, spec.max_tokens)


@pytest.mark.parametrize("cores", [1, 7])
def test_any_core_count_covers_all_panels_once(cores: int) -> None:
    """More cores than the machine has, and than there are panels: `accumulate` would show one counted twice."""
    specs = (LinearSpec(90, 3000, F32, 3000, 90, max_tokens=40, accumulate=True),)
    for tokens in (1, 40):
        check(specs[0], specs, tokens, replace(MACHINE, cores=cores))


@pytest.mark.parametrize("lanes", [4, 16])
def test_vector_width_of_other_machines(lanes: int) -> None:
    """LLVM splits the vectors of AVX-512 machines and runs those of NEON as SSE, so their code paths run here too."""
    machine = replace(MACHINE, lanes=lanes, registers=32)
    specs = tuple(LinearSpec(150, 300, fmt, 300, 150, max_tokens=31) for fmt in FORMATS.values())
    for spec in specs:
        for tokens in (1, 3, 31):
            check(spec, specs, tokens, machine)


def test_equal_specs_share_one_kernel() -> None:
    spec = LinearSpec(64, 64, F32, 64, 64, 4)
    assert build(spec, MACHINE) is build(replace(spec), MACHINE)
    assert build(replace(spec, ldx=65), MACHINE).name != spec.name


@pytest.mark.parametrize(
    ("machine", "vector_fma"),
    [
        (replace(MACHINE, lanes=16, registers=32, mcpu="x86-64-v4"), r"vfmadd\d+ps.*%zmm"),
        (replace(MACHINE, lanes=8), r"vfmadd\d+ps.*%ymm"),
        (
            replace(MACHINE, lanes=4, registers=32, mcpu="neoverse-n1", triple="aarch64-linux-gnu"),
            r"fmla\s+v\d+\.4s",
        ),
    ],
    ids=["avx512", "avx2", "neon"],
)
def test_code_for_other_machines_uses_their_vectors(machine: Machine, vector_fma: str) -> None:
    """The sums of a register tile stay in registers: its inner loop holds the multiply-adds and no store."""
    kernel = panel_product(machine)
    module = build_module([kernel], {"main": program(kernel, ("float32",) * 3 + ("scalar",) * 2)})
    assembly = compile_module(module, machine).mod.inspect_source("asm")
    blocks = re.split(r"^\.LBB\w+:", assembly, flags=re.MULTILINE)
    sizes = blocking(machine)
    tile = sizes.mr * sizes.vectors
    loops = [b for b in blocks if len(re.findall(vector_fma, b)) >= tile]
    assert loops
    assert any(not re.search(r"(mov[au]ps\s+%[xyz]mm\d+, |\bst[rp]\s+q)", b) for b in loops)
