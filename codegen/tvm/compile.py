"""From a CPU-ready module to a shared library, through a cache of compiled programs addressed by content."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moec.codegen.tvm.library_cache import find_or_build
from moec.errors import InputError, MoecError
from moec.ir import ENTRIES, Module, print_module
from moec.ir.rewrite import clone_module
from moec.plugins import plugins
from moec.targets import Target

if TYPE_CHECKING:
    from moec.codegen.tvm.program import Phase, Sizes
    from moec.codegen.tvm.tir import Kernel, Machine

PAGE = 64
SOURCE = "source"
"""Folder of a library's source, beside it."""

FEATURES = {
    "avx_vnni": "avxvnni", "avx512_vbmi": "avx512vbmi", "avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16", "amx_tile": "amx-tile", "amx_bf16": "amx-bf16", "amx_int8": "amx-int8",
}  # fmt: skip
"""Instruction sets of a target beyond its architecture level that kernels use: the target's name -> LLVM's."""


class NoKernel(InputError):
    """An op that the CPU back end cannot run."""

    template: ClassVar[str] = (
        "no CPU kernel for {ops}: run the passes that replace them (fuse, mla-absorb, select-kernels)"
    )


class NoCompiler(MoecError):
    """The package that compiles CPU kernels is not installed."""

    template: ClassVar[str] = "compiling for a CPU needs the package apache-tvm: pip install 'moec[cpu]'"


class CompilerFailed(MoecError):
    """TVM or the linker failed."""

    template: ClassVar[str] = "compiling the kernels failed: {message}"


@dataclass(frozen=True)
class Compiled:
    """Compiled program: the library, how to call it, and its kernels."""

    library: Path
    source: Path | None
    """Folder with the library's source, where it was asked for."""
    entries: dict[str, Any]
    kernels: list[dict[str, Any]]
    cached: bool
    note: str
    """Where the library comes from, for the user."""


@dataclass(frozen=True)
class Watched:
    """A library whose functions have one more output; `phases`: {symbol: {entry, points}}.

    `entry` says how to call one, `points` are the fields of `tracing.TracePoint` or `profiling.ProfilePoint`.
    """

    library: Path
    phases: dict[str, Any]


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
        features=tuple(FEATURES[i] for i in d.isa if i in FEATURES),
    )


def compile_module(module: Module, target: Target, limits: Mapping[str, int], source: bool = False) -> Compiled:
    """Compile `@prefill`, `@decode`, and `@draft` where the module has it; `limits`: batch, context, chunk, drafts.

    Equal inputs find the library in the cache; two processes may compile at once, the first to finish is kept. With
    `source` its text is kept as well. Raises NoKernel or CompilerFailed.
    """
    key = _key(module, target, {**limits, "source": 1} if source else limits)
    entry = find_or_build(key, lambda work: _build(module, target, limits, work, source))
    described = json.loads((entry.folder / "program.json").read_text(encoding="utf-8"))
    text = entry.folder / SOURCE if source else None
    return Compiled(
        entry.folder / "kernels.so", text, described["entries"], described["kernels"], entry.cached, entry.note
    )


def compile_watched(module: Module, target: Target, limits: Mapping[str, int], watch: str) -> Watched:
    """Compile so that a call tells more, see `build_phase`: `@prefill` with "trace", every entry with "ticks".

    Cached as `compile_module`'s, raises the same.
    """
    key = _key(module, target, {**limits, watch: 1})
    folder = find_or_build(key, lambda work: _build_watched(module, target, limits, watch, work)).folder
    return Watched(folder / "kernels.so", json.loads((folder / "program.json").read_text(encoding="utf-8")))


def _key(module: Module, target: Target, limits: Mapping[str, int]) -> str:
    """Everything that the machine code depends on: program, limits, CPU, TVM, and the code generator itself."""
    try:
        tvm = version("apache-tvm")
    except PackageNotFoundError:
        raise NoCompiler() from None
    program = clone_module(module)
    for weight in program.weights.values():
        # How a weight is made does not show in the code that reads it.
        weight.program.ops = []
    digest = hashlib.sha256(_functions_text(program).encode())
    digest.update(json.dumps([_machine_facts(target), dict(limits), tvm], sort_keys=True).encode())
    for source in generator():
        digest.update(source.read_bytes())
    for name, emitter in plugins("moec.cpu_kernels"):
        digest.update(name.encode() + Path(inspect.getfile(emitter)).read_bytes())
    return digest.hexdigest()[:32]


def generator() -> list[Path]:
    """The source files that decide how a program becomes machine code."""
    here = Path(__file__).resolve().parent
    return sorted([*here.glob("*.py"), *here.parent.glob("*.py"), *(here.parents[1] / "ir").rglob("*.py")])


def _functions_text(module: Module) -> str:
    weights = {n: [str(w.type), w.indices] for n, w in module.weights.items()}
    module.weights, module.name = {}, "m"
    return print_module(module, locations=False) + json.dumps(weights)


def _machine_facts(target: Target) -> list[Any]:
    d = target.device
    return [d.vector_bits, d.arch, list(d.isa), d.cores, dict(d.cache_bytes)]


def _build(module: Module, target: Target, limits: Mapping[str, int], folder: Path, source: bool) -> None:
    from moec.codegen.tvm.program import build_phase, kernel_table
    from moec.codegen.tvm.segments import build_segmented, is_sharded

    _require_kernels(module)
    machine = machine_of(target)
    phases: list[Phase] = []
    entries: dict[str, Any] = {}
    shared: dict[str, Kernel] = {}
    for name in _entries(module):
        if is_sharded(module):
            segments, entries[name] = build_segmented(module, name, _sizes(name, limits), machine, shared)
            phases += segments
        else:
            phases.append(build_phase(module, name, _sizes(name, limits), machine, kernels=shared))
            entries[name] = phases[-1].entry.as_json()
    _export(phases, machine, folder, source)
    described = {"entries": entries, "kernels": kernel_table(phases)}
    (folder / "program.json").write_text(json.dumps(described, sort_keys=True), encoding="utf-8")


def _build_watched(module: Module, target: Target, limits: Mapping[str, int], watch: str, folder: Path) -> None:
    from moec.codegen.tvm.program import build_phase

    _require_kernels(module)
    machine = machine_of(target)
    names = ("prefill",) if watch == "trace" else _entries(module)
    shared: dict[str, Kernel] = {}
    phases = [build_phase(module, name, _sizes(name, limits), machine, watch, shared) for name in names]
    _export(phases, machine, folder)
    described = {p.entry.symbol: {"entry": p.entry.as_json(), "points": [asdict(q) for q in p.points]} for p in phases}
    (folder / "program.json").write_text(json.dumps(described, sort_keys=True), encoding="utf-8")


def _require_kernels(module: Module) -> None:
    from moec.codegen.tvm.emit import missing_ops

    if missing := missing_ops(module):
        raise NoKernel(ops=", ".join(missing))


def _sizes(phase: str, limits: Mapping[str, int]) -> Sizes:
    """Prefill takes a chunk of one sequence, decode a token of every sequence and those that were drafted for it.

    A draft takes either: of a prompt it only fills its cache.
    """
    from moec.codegen.tvm.program import Sizes

    context, chunk, batch = limits["context"], min(limits["chunk"], limits["context"]), limits["batch"]
    pages, step = batch * -(-context // PAGE), batch * (1 + limits.get("drafts", 0))
    if phase == "prefill":
        return Sizes(chunk, chunk, context, 1, PAGE, pages)
    if phase == "decode":
        return Sizes(step, step, context, batch, PAGE, pages)
    tokens = max(chunk, step)
    return Sizes(tokens, tokens, context, batch, PAGE, pages)


def _entries(module: Module) -> tuple[str, ...]:
    return tuple(name for name in ENTRIES if name in module.functions)


def _export(phases: Sequence[Phase], machine: Machine, folder: Path, source: bool = False) -> None:
    from moec.codegen.tvm.program import program_functions
    from moec.codegen.tvm.source import write_source
    from moec.codegen.tvm.tir import build_module, compile_module

    script = build_module(*program_functions(phases))
    library = compile_module(script, machine)
    if source:
        (folder / SOURCE).mkdir()
        write_source(script, library, folder / SOURCE)
    try:
        library.export_library(str(folder / "kernels.so"))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CompilerFailed(message=lines[-1]) from None
