"""`moec doctor`: what this machine has of what moec uses, and what to do about the rest."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Final

import typer

_PACKAGES: Final = (
    ("numpy", "", "pip install numpy"),
    ("apache-tvm-ffi", "runs CPU kernels", "pip install 'moec[cpu]'"),
    ("apache-tvm", "compiles CPU kernels", "pip install 'moec[cpu]'"),
    ("torch", "traces models", "pip install torch"),
    ("triton", "compiles GPU kernels", "for GPU targets: pip install 'moec[gpu]'"),
    ("safetensors", "reads checkpoints", "pip install safetensors"),
    ("tokenizers", "text in and out", "pip install tokenizers"),
    ("jinja2", "chat templates", "pip install jinja2"),
)
_PINNED: Final = {"apache-tvm": "0.27", "apache-tvm-ffi": "0.1", "triton": "3.6"}
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FREE_DISK: Final = 2 << 30


@dataclass(frozen=True)
class Line:
    """One finding; `advice` says what to do when it is not ok."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def register(app: typer.Typer) -> None:
    """Add `moec doctor`."""
    app.command("doctor")(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, CPU, memory and settings.

    A warning says what to do.
    """
    lines = list(examine())
    if as_json:
        print(json.dumps({"ok": all(line.ok for line in lines), "lines": [asdict(line) for line in lines]}))
        return
    width = max(len(line.name) for line in lines)
    for line in lines:
        advice = f"  -> {line.advice}" if line.advice and not line.ok else ""
        print(f"{'ok  ' if line.ok else 'warn'}  {line.name:{width}}  {line.found}{advice}")


def examine() -> Iterator[Line]:
    """All findings in the order in which they are shown."""
    yield _python()
    for name, use, advice in _PACKAGES:
        yield _package(name, use, advice)
    yield from _cpu()
    yield _threads()  # before the library is loaded, which sets its variables
    yield _runtime_library()
    yield _linker()
    yield _huge_pages()
    yield _gpu()
    yield _disk()


def _python() -> Line:
    found = f"{platform.python_version()} ({sys.executable})"
    return Line("python", sys.version_info >= (3, 11), found, "moec needs Python 3.11 or newer")


def _package(name: str, use: str, advice: str) -> Line:
    purpose = f" ({use})" if use else ""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Line(name, False, f"not installed{purpose}", advice)
    pinned = _PINNED.get(name, "")
    fits = version == pinned or version.startswith(f"{pinned}.") or not pinned
    return Line(name, fits, f"{version}{purpose}", f"moec is tested with {pinned}: {advice}")


def _runtime_library() -> Line:
    from moec.runtime.errors import NoRuntimeLibrary
    from moec.runtime.library import load_runtime, runtime_library

    try:
        load_runtime()
    except NoRuntimeLibrary as error:
        return Line("TVM runtime", False, "does not load", str(error))
    return Line("TVM runtime", True, str(runtime_library()))


def _linker() -> Line:
    name = next((n for n in (os.environ.get("CXX", ""), "g++", "clang++", "gcc", "clang") if n and shutil.which(n)), "")
    found = shutil.which(name) or "" if name else "none found"
    return Line("C++ compiler", bool(name), found, "it links kernel libraries: install gcc (apt install g++)")


def _cpu() -> Iterator[Line]:
    from moec.targets.detect import detect

    cpu = detect()
    wide = cpu.arch in ("x86-64-v3", "x86-64-v4", "aarch64", "arm64")
    known = f"{cpu.model}, {cpu.arch}, {cpu.cores} usable cores, {cpu.vector_bits}-bit vectors"
    yield Line("CPU", wide, known, "without AVX2 and FMA (x86-64-v3) kernels are slow")
    yield Line("CPU features", bool(cpu.isa), " ".join(cpu.isa) or "unknown", "/proc/cpuinfo names none")
    gib = cpu.memory_bytes / 2**30
    yield Line("memory", gib >= 4, f"{gib:.1f} GiB", "large models do not fit: use the tiny preset")


def _threads() -> Line:
    from moec.runtime.library import default_threads, usable_cpus

    asked = {name: os.environ[name] for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ}
    settings = "".join(f", {name}={value}" for name, value in asked.items())
    threads, cpus = default_threads(), usable_cpus()
    advice = f"unset TVM_NUM_THREADS to use all {cpus} CPUs" if threads < cpus else "more threads than CPUs: unset it"
    return Line("threads", threads == cpus, f"{threads} for kernels{settings}", advice)


def _huge_pages() -> Line:
    if not _HUGE_PAGES.exists():
        return Line("huge pages", True, "not known on this system")
    mode = _HUGE_PAGES.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    advice = f"decoding reads memory faster with them: echo madvise | sudo tee {_HUGE_PAGES}"
    return Line("huge pages", mode in ("always", "madvise"), mode or "unknown", advice)


def _gpu() -> Line:
    found = sorted(p.name for p in Path("/dev").glob("nvidia[0-9]*"))
    return Line("GPU", True, ", ".join(found) if found else "none (CPU targets run; GPU targets compile only)")


def _disk() -> Line:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 2**30:.1f} GiB free in {Path.cwd()}"
    return Line("disk", free >= _FREE_DISK, found, "artifacts are as large as their weights: free some space")
