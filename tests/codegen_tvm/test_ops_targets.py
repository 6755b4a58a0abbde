"""The kernels' inner loops use the vector registers of machines other than this one (compiled, not run)."""

from __future__ import annotations

import pytest
from ops_runner import program

from moec.codegen.tvm.cache import CacheLayout
from moec.codegen.tvm.mla_decode import MlaDecodeSpec, build_mla_decode
from moec.codegen.tvm.tir import Machine, build_module, compile_module

AVX512 = Machine(lanes=16, registers=32, cores=4, mcpu="x86-64-v4")
NEON = Machine(lanes=4, registers=32, cores=4, mcpu="neoverse-n1", triple="aarch64-linux-gnu")


@pytest.mark.parametrize(
    "machine,multiply_add,register", [(AVX512, "vfmadd", "zmm"), (NEON, "fmla", ".4s")], ids=["avx512", "neon"]
)
def test_attention_multiplies_whole_registers(machine: Machine, multiply_add: str, register: str) -> None:
    heads, layout = 32, CacheLayout(64, 16, "f32", 4)
    spec = MlaDecodeSpec(heads, layout, 0.1, 1, heads * 64, 64, heads * 16, 16, heads * 64, 64)
    kernel = build_mla_decode(spec, machine)
    signature = ("float32",) * 3 + ("int32",) * 3 + ("float32",) * 2 + ("scalar",)
    library = compile_module(build_module([kernel], {"main": program(kernel, signature)}), machine)
    assembly = library.mod.inspect_source("asm").splitlines()
    products = [line for line in assembly if multiply_add in line]
    # Scores and outputs: a block of 14 keys or elements times 2 vectors each.
    assert sum(register in line for line in products) >= 2 * 28
