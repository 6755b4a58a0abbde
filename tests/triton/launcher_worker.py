"""Launches kernels by Triton's own launcher and by ours, over a driver library that notes what it is asked.

Started by test_launcher.py with the path of the notes and (target, recipe, kernels); prints what both asked for, as
JSON. The library's folder must be in LD_LIBRARY_PATH and TRITON_LIBCUDA_PATH.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from generated import program

from moec.codegen.triton import aot
from moec.codegen.triton.arch import architecture
from moec.codegen.triton.compiler import built, fixed_addresses
from moec.codegen.triton.fused.check import symbols
from moec.codegen.triton.problem import Problem, bind, matrices
from moec.codegen.triton.spec import Instance, registry
from moec.ir.expr import evaluate
from moec.runtime.cuda import Driver, Kernel

WIDTHS = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4, "b8": 1}
STREAM = 0x77


class Active:
    """What Triton's launch path asks of its driver, without torch's view of the device."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        known = architecture(arch)
        self.target = GPUTarget(known.backend, known.version, known.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def parameter_bytes(ptx: str) -> list[int]:
    """The size of every parameter of the entry, as the assembly declares it."""
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None
    found = []
    for line in entry[1].splitlines():
        if declared := re.search(r"\.param (?:\.align \d+ )?\.(\w+).*?(?:\[(\d+)\])?,?$", line.strip()):
            found.append(WIDTHS[declared[1]] * int(declared[2] or 1))
    return found


def instance_of(target: str, recipe: str, name: str) -> Instance:
    """A kernel of the small model's program at five tokens, or a declared one at its first case."""
    if name in registry():
        spec = registry()[name]
        case = next(c for c in spec.cases if not c.interpreted)
        return replace(spec.instance(program(target, recipe).table.arch, "", **case.dims), types=case.types)
    instance = program(target, recipe).table.entries[name].instance
    kernel = instance.spec.build.keywords["kernel"]  # type: ignore[attr-defined]
    return replace(instance, dims={**instance.dims, "T": 5, "ROWS": evaluate(kernel.rows, symbols(5)), "LOAD": 0})


def main() -> None:
    notes, target, recipe, *names = sys.argv[1:]
    fixed_addresses()
    library = ctypes.CDLL("libcuda.so.1")
    library.fake_notes(notes.encode())
    file = Path(notes)
    from triton.runtime import driver as triton_driver

    driver, found = Driver(), []
    triton_driver.set_active(Active(program(target, recipe).table.arch))

    def since(start: int) -> list[str]:
        return file.read_text()[start:].splitlines()

    for name in names:
        instance = instance_of(target, recipe, name)
        arguments = instance.spec.build(Problem(instance, torch.Generator().manual_seed(0), "cpu"))
        with contextlib.redirect_stdout(sys.stderr):
            theirs = built(aot.request_of(instance))
        (ours,) = aot.compile_kernels([instance], strict=False)
        sizes = parameter_bytes(theirs.asm["ptx"])
        library.fake_parameters(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        # Every argument of the function, constants too, in its order.
        given = {**instance.constants, **bind(instance, arguments)}
        x, y, z = (*instance.grid(), 1, 1)[:3]
        at = len(file.read_text())
        theirs[(x, y, z)](*(given[n] for n in instance.spec.jit().arg_names), stream=STREAM)
        by_triton, at = since(at), len(file.read_text())
        kernel = Kernel(driver, ours.record(), ours.binary)
        kernel.launch(instance.grid(), matrices(instance, arguments), stream=STREAM)
        found.append({
            "kernel": name, "sizes": sizes, "triton": by_triton, "ours": since(at),
            "same_binary": theirs.asm["cubin"] == ours.binary, "kinds": list(instance.signature.values()),
        })  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
