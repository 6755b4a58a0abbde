"""Random packed weights with their exact values in float64, and many kernels compiled at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from ops_runner import program

from moec.codegen.tvm.tir import Kernel, Machine, build_module, compile_module
from moec.ir.lane16 import BF16, F32, MXFP4, Format
from moec.ir.numeric import Packed, Quantised, quantise


@dataclass(frozen=True)
class Weight:
    """A packed matrix (or stack), the kernel operands that hold it, and what it stands for."""

    operands: tuple[torch.Tensor, ...]  # packed lanes and, for scaled formats, scales
    values: torch.Tensor  # float64 [..., N, K]


def random_weight(fmt: Format, *shape: int, seed: int = 0) -> Weight:
    """A random matrix [..., N, K] in `fmt`; FP8 with a different scale for each block of 128x128, or 1x128."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=generator)
    stored: torch.Tensor | Quantised = w
    if fmt is BF16:
        stored = w.bfloat16()
    elif fmt is MXFP4:
        sizes = torch.exp2(torch.randint(-6, 6, (w.shape[-2], 1), generator=generator))
        stored = quantise(w * sizes, fmt.name, (1, 32), "ue8m0")
    elif fmt is not F32:
        rows = 1 if fmt.row_scales else 128
        scales = 0.01 + torch.rand(*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // 128), generator=generator)
        stored = Quantised((w * 40).to(torch.float8_e4m3fn), scales, "fp8_e4m3", (rows, 128))
    return packed_weight(Packed(stored))


def packed_weight(packed: Packed) -> Weight:
    """Kernel operands of a packed matrix and its values."""
    scales = packed.scales()
    return Weight((packed.data(), *([] if scales is None else [scales])), packed.logical(torch.float64))


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error, relative to the largest exact magnitude."""
    return float((result.double() - exact).abs().max() / exact.abs().max())


@cache
def compiled_together(
    build: Callable[[Any, Machine], Kernel], specs: Sequence[Any], machine: Machine
) -> dict[Any, Callable[..., None]]:
    """The kernels of `specs` as functions of tensors and int32 scalars: one module, so that they share drivers."""
    kernels = [build(spec, machine) for spec in specs]
    programs = {}
    for i, kernel in enumerate(kernels):
        signature = tuple(str(getattr(p.ty, "element_type", "scalar")) for p in kernel.func.params)
        programs[f"main{i}"] = program(kernel, signature).with_attr("global_symbol", f"main{i}")
    library = compile_module(build_module(kernels, programs), machine).jit()

    def function(i: int) -> Callable[..., None]:
        main = library[f"main{i}"]
        return lambda *args: main(*[a.view(-1) if isinstance(a, torch.Tensor) else a for a in args])

    return {spec: function(i) for i, spec in enumerate(specs)}
