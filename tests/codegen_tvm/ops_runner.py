"""Runs one kernel on torch tensors: the smallest program around it, compiled once per kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Kernel, Machine, build_module, call, compile_module
from moec.runtime.machine import allow_tiles, cpu_features

MACHINE = Machine()
SERIAL = Machine(cores=1)
AVX512 = Machine(lanes=16, registers=32, mcpu="x86-64-v4")
AMX = replace(AVX512, l2_bytes=1 << 20, features=("avx512fp16", "avx512vnni", "amx-tile", "amx-bf16"))
_NEEDS = {
    MACHINE: {"avx2", "fma"},
    AVX512: {"avx512f", "avx512bw", "avx512vl"},
    AMX: {"amx_tile", "avx512_fp16", "avx512_vnni"},
}
MACHINES = [m for m in _NEEDS if cpu_features() >= _NEEDS[m]]
"""Instruction sets that can run here."""
allow_tiles()
DTYPES = {torch.float32: "float32", torch.int32: "int32", torch.uint16: "uint16", torch.uint8: "uint8"}


def program(kernel: Kernel, signature: tuple[str, ...]) -> Any:
    """A function `main` that passes tensors of any size (by element type) and int32 scalars on to the kernel."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"global_symbol": "main"})
        arguments = []
        for i, kind in enumerate(signature):
            if kind == "scalar":
                arguments.append(T.arg(f"n{i}", T.int32()))
            else:
                handle = T.arg(f"p{i}", T.handle())
                buffer = T.match_buffer(handle, (T.int64(),), kind, align=4)
                arguments.append(T.address_of(buffer[0]))
        call(kernel, *arguments)
    return builder.get()


@cache
def compiled(build: Callable[[Any, Machine], Kernel], spec: Any, machine: Machine, signature: tuple[str, ...]) -> Any:
    kernel = build(spec, machine)
    module = build_module([kernel], {"main": program(kernel, signature)})
    return compile_module(module, machine)["main"]


def run(
    build: Callable[[Any, Machine], Kernel], spec: Any, *arguments: torch.Tensor | int, machine: Machine = MACHINE
) -> None:
    """Call the kernel of `spec`: tensors (contiguous; bf16 as its bits) by pointer, integers by value."""
    flat: list[torch.Tensor | int] = []
    signature = []
    for a in arguments:
        if isinstance(a, torch.Tensor):
            bits = a.view(torch.uint16) if a.dtype == torch.bfloat16 else a
            signature.append(DTYPES[bits.dtype])
            flat.append(bits.view(-1))
        else:
            signature.append("scalar")
            flat.append(a)
    compiled(build, spec, machine, tuple(signature))(*flat)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal fp32 values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ints(values: list[int]) -> torch.Tensor:
    """int32 tensor."""
    return torch.tensor(values, dtype=torch.int32)
