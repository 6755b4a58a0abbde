"""From a CPU-ready module to a shared library, through a cache of compiled programs addressed by content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moec.errors import InputError, MoecError
from moec.ir import Module, print_module
from moec.ir.rewrite import clone_module
from moec.targets import Target

if TYPE_CHECKING:
    from moec.codegen.tvm.tir import Machine

PAGE = 64


class NoKernel(InputError):
    """An op that the CPU back end cannot run."""

    template: ClassVar[str] = "no CPU kernel for {ops}: run the passes that replace them (fuse, mla-absorb, select-kernels)"


class CompilerFailed(MoecError):
    """TVM or the linker failed."""

    template: ClassVar[str] = "compiling the kernels failed: {message}"


@dataclass(frozen=True)
class Compiled:
    """Compiled program: the library, how to call it, and its kernels."""

    library: Path
    entries: dict[str, Any]
    kernels: list[dict[str, Any]]
    cached: bool


def machine_of(target: Target) -> Machine:
    """What kernel builders need to know of a CPU target."""
    from moec.codegen.tvm.tir import Machine

    d = target.device
    lanes = max(4, int(d.vector_bits) // 32)
    wide = lanes == 16 or d.arch.startswith("arm")
    caches = d.cache_bytes
    return Machine(
        lanes=lanes,
        registers=32 if wide else 16,
        cores=int(d.cores),
        l1_bytes=int(caches.get("l1", 32 << 10)),
        l2_bytes=int(caches.get("l2", 512 << 10)) // max(1, int(d.cores)),
        mcpu=d.arch,
    )


def cache_folder() -> Path:
    """`$MOEC_CACHE_DIR`, or `moec` in the user's cache folder."""
    base = os.environ.get("MOEC_CACHE_DIR")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moec"


def compile_module(module: Module, target: Target, limits: Mapping[str, int]) -> Compiled:
    """Compile `@prefill` and `@decode`; `limits`: batch, context, chunk.

    Equal inputs find the library in the cache; two processes may compile at once, the first to finish is kept.
    Raises NoKernel or CompilerFailed.
    """
    folder = cache_folder() / "cpu" / _key(module, target, limits)
    if (folder / "kernels.so").exists():
        return _read(folder, cached=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".build-", dir=folder.parent))
    try:
        _build(module, target, limits, work)
        try:
            work.rename(folder)
        except OSError:
            if not (folder / "kernels.so").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _read(folder, cached=False)


def _read(folder: Path, cached: bool) -> Compiled:
    described = json.loads((folder / "program.json").read_text())
    return Compiled(folder / "kernels.so", described["entries"], described["kernels"], cached)


def _key(module: Module, target: Target, limits: Mapping[str, int]) -> str:
    """Everything that the machine code depends on: program, limits, CPU, TVM, and the code generator itself."""
    program = clone_module(module)
    for weight in program.weights.values():
        # How a weight is made does not show in the code that reads it.
        weight.program.ops = []
    digest = hashlib.sha256(_functions_text(program).encode())
    digest.update(json.dumps([_machine_facts(target), dict(limits), version("apache-tvm")], sort_keys=True).encode())
    here = Path(__file__).resolve().parent
    for source in sorted([*here.glob("*.py"), here.parent / "storage.py"]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _functions_text(module: Module) -> str:
    weights = {n: [str(w.type), w.indices] for n, w in module.weights.items()}
    module.weights, module.name = {}, "m"
    return print_module(module, locations=False) + json.dumps(weights)


def _machine_facts(target: Target) -> list[Any]:
    d = target.device
    return [d.vector_bits, d.arch, d.cores, dict(d.cache_bytes)]


def _build(module: Module, target: Target, limits: Mapping[str, int], folder: Path) -> None:
    from moec.codegen.tvm.emit import missing_ops
    from moec.codegen.tvm.program import Sizes, build_phase, kernel_table, program_functions
    from moec.codegen.tvm.tir import build_module, compile_module

    missing = missing_ops(module)
    if missing:
        raise NoKernel(ops=", ".join(missing))
    machine = machine_of(target)
    context, chunk, batch = limits["context"], min(limits["chunk"], limits["context"]), limits["batch"]
    pages = batch * -(-context // PAGE)
    phases = [
        build_phase(module, "prefill", Sizes(chunk, chunk, context, 1, PAGE, pages), machine),
        build_phase(module, "decode", Sizes(batch, batch, context, batch, PAGE, pages), machine),
    ]
    kernels, functions = program_functions(phases)
    library = compile_module(build_module(kernels, functions), machine)
    try:
        library.export_library(str(folder / "kernels.so"))
    except Exception as error:
        raise CompilerFailed(message=str(error).strip().splitlines()[-1]) from None
    described = {"entries": {p.entry.symbol: p.entry.as_json() for p in phases}, "kernels": kernel_table(phases)}
    (folder / "program.json").write_text(json.dumps(described, sort_keys=True))


