"""Compiles kernels ahead of time, for machines that are not there: in parallel, cached by content, checked.

    compiled = compile_kernels(instances("sm_90a"))
    write(compiled, Path("out/kernels"))

Needs Triton and no GPU, driver or torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import moec
from moec.codegen.triton import cache
from moec.codegen.triton.arch import architecture
from moec.codegen.triton.errors import CheckFailed, CompileFailed, TritonMissing
from moec.codegen.triton.facts import problems
from moec.codegen.triton.spec import Instance

# Part of every cache key: raised when what is stored, or how it is compiled, changes.
FORMAT = 1
KERNELS = Path(__file__).parent / "kernels"


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled: its binary (cubin or hsaco), its assembly, and what is known about both."""

    instance: Instance
    binary: bytes
    assembly: bytes
    facts: dict[str, Any]
    cached: bool

    @property
    def seconds(self) -> float:
        """What compiling took, when it was done."""
        return float(self.facts["seconds"])

    @property
    def spills_listed(self) -> bool:
        return bool(0 < self.facts["spill_stores"] <= self.instance.tile.spills)

    def problems(self) -> list[str]:
        """What fails of: tensor instruction, spills, shared memory, registers, parameters, serialised wgmma."""
        spec, arch = self.instance.spec, architecture(self.instance.arch)
        return problems(self.facts, arch, spec.tensor_core, self.instance.tile.spills, parameter_count(self.instance))

    def file_names(self, name: str) -> tuple[str, str]:
        binary, assembly = ("cubin", "ptx") if architecture(self.instance.arch).nvidia else ("hsaco", "amdgcn")
        return f"{name}.{binary}", f"{name}.{assembly}"

    def record(self, name: str = "") -> dict[str, Any]:
        """The kernel's entry in kernels.json; `launch` is what a loader needs beside the binary."""
        instance = self.instance
        name = name or instance.name
        binary, assembly = self.file_names(name)
        return {
            "name": name,
            "ops": list(instance.spec.ops),
            "cubin": binary,
            "ptx": assembly,
            "registers": self.facts["registers"],
            "spill_stores": self.facts["spill_stores"],
            "spills_listed": self.spills_listed,
            "shared_bytes": self.facts["shared_bytes"],
            "tensor_instruction": self.facts["tensor_instruction"],
            "launch": {
                "arch": instance.arch,
                "symbol": self.facts["symbol"],
                "threads": self.facts["threads"],
                "global_scratch": self.facts["global_scratch"],
                "parameters": [[name, kind, name in aligned(instance)] for name, kind in instance.signature.items()],
                "tensor_maps": self.facts["tensor_maps"],
                "function": instance.spec.function,
                "constants": instance.constants,
                "warps": instance.tile.num_warps,
                "stages": instance.tile.num_stages,
                "tile": instance.origin,
                "grid": list(instance.spec.grid),
                "sha256": cache.digest(self.binary),
            },
        }


def parameter_count(instance: Instance) -> int:
    """Parameters of the compiled entry: a descriptor is a map, sizes and strides; two scratch pointers end it."""
    kinds = instance.signature.values()
    return 2 + sum(1 + 2 * (k.count(",") + 1) if k.startswith("tensordesc") else 1 for k in kinds)


def aligned(instance: Instance) -> set[str]:
    """Arguments that are multiples of 16: all pointers, and the sizes that the spec names."""
    pointers = {name for name, kind in instance.signature.items() if kind.startswith("*")}
    sizes = {name for name in instance.spec.aligned if name in instance.signature}
    return (pointers | sizes) - set(instance.spec.loose) - set(instance.loose)


def path_of(module: str) -> Path:
    """The source of a kernel module: one of this package, or with its full name one of another."""
    if "." not in module:
        return KERNELS / f"{module}.py"
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    return Path(found.origin)


@lru_cache(maxsize=64)
def modules_of(module: str) -> tuple[str, ...]:
    """A kernel module and those that it imports, directly or not, each once."""
    return tuple(dict.fromkeys([module, *imported(path_of(module).read_text(encoding="utf-8"))]))


def imported(text: str) -> list[str]:
    """The modules of `kernels/` that a module's text imports, directly or not, each once."""
    used = re.findall(r"^from moec\.codegen\.triton\.kernels\.(\w+) import", text, re.MULTILINE)
    return list(dict.fromkeys(m for name in sorted(set(used)) for m in modules_of(name)))


@lru_cache(maxsize=512)
def source_of(spec_function: str, source: str) -> str:
    """All text that a kernel is compiled from."""
    module = spec_function.partition(":")[0]
    if not source:
        return "".join(path_of(name).read_text(encoding="utf-8") for name in modules_of(module))
    return source + "".join(path_of(name).read_text(encoding="utf-8") for name in imported(source))


def header(users: Sequence[Instance]) -> str:
    """Comment lines above a source in an artifact: which kernels came from it, for which ops, with which constants."""
    lines = [
        f"# {i.name}.{i.arch}: {', '.join(i.spec.ops)}; {i.tile.num_warps} warps, {i.tile.num_stages} stages; "
        + ", ".join(f"{name}={value}" for name, value in i.constants.items())
        for i in users
    ]
    return "".join(f"{line}\n" for line in lines)


def triton_version() -> str:
    """Raises TritonMissing."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise TritonMissing() from None


def request_of(instance: Instance) -> dict[str, Any]:
    """All that decides the compiled result, with its hash as `key`."""
    content = {
        "format": FORMAT,
        "triton": triton_version(),
        "arch": instance.arch,
        "function": instance.spec.function,
        "source": hashlib.sha256(source_of(instance.spec.function, instance.spec.source).encode()).hexdigest(),
        "signature": instance.signature,
        "constants": instance.constants,
        "aligned": sorted(aligned(instance)),
        "num_warps": instance.tile.num_warps,
        "num_stages": instance.tile.num_stages,
    }
    # Order of arguments decides parameters: the signature is hashed as it stands, not sorted.
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {**content, "key": key, "text": instance.spec.source}


class Worker:
    """A compiler process; the next request after a crash starts a new one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = tempfile.TemporaryDirectory(prefix="moec-triton-")
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        """No line information and a scratch cache of its own: the result depends on nothing but the request."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        environment |= {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_CACHE_DIR": self.scratch.name}
        # A script may have found this package by a path of its own.
        paths = [str(Path(moec.__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        command = [sys.executable, "-m", "moec.codegen.triton.compiler", str(self.folder)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def compile(self, request: dict[str, Any]) -> str:
        """Sends one request; what went wrong, or nothing."""
        if self.process is None:
            self.process = self.start()
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return str(json.loads(line).get("error", ""))
        status = self.process.wait()
        self.process = None
        return f"the compiler's process ended with status {status}"

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin and self.process.stdout
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
        self.scratch.cleanup()


def compile_missing(requests: Sequence[dict[str, Any]], folder: Path, jobs: int) -> dict[str, str]:
    """Compiles into the cache with `jobs` processes; the errors by key."""
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for request in requests:
        waiting.put(request)
    errors: dict[str, str] = {}

    def work() -> None:
        worker = Worker(folder)
        try:
            while True:
                request = waiting.get_nowait()
                if error := worker.compile(request):
                    errors[request["key"]] = error
        except queue.Empty:
            return
        finally:
            worker.close()

    count = max(1, min(jobs, len(requests)))
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work) for _ in range(count)]:
            done.result()
    return errors


def compile_kernels(
    wanted: Sequence[Instance], *, jobs: int = 2, folder: Path | None = None, strict: bool = True
) -> list[Compiled]:
    """The kernels, in order, from the cache in `folder` (the user's without it) or compiled into it.

    Raises CompileFailed, TritonMissing, and with `strict` CheckFailed for a kernel with `problems()`.
    """
    results = []
    for compiled in try_compile(wanted, jobs=jobs, folder=folder):
        if isinstance(compiled, CompileFailed):
            raise compiled
        results.append(compiled)
    if strict and (failed := [k for k in results if k.problems()]):
        first = failed[0].instance
        raise CheckFailed(
            name=first.name, arch=first.arch, problems="; ".join(failed[0].problems()),
            instances=[k.instance for k in failed],
        )  # fmt: skip
    return results


def try_compile(
    wanted: Sequence[Instance], *, jobs: int = 2, folder: Path | None = None
) -> list[Compiled | CompileFailed]:
    """The same, with the reason in the place of each kernel that does not compile. Raises TritonMissing."""
    home = folder or cache.default_folder()
    requests = [request_of(instance) for instance in wanted]
    found = {r["key"]: cache.load(home, r["key"]) for r in requests}
    missing = {r["key"]: r for r in requests if found[r["key"]] is None}
    errors = compile_missing(list(missing.values()), home, jobs) if missing else {}
    results: list[Compiled | CompileFailed] = []
    for instance, request in zip(wanted, requests, strict=True):
        key = request["key"]
        entry = None if key in errors else found[key] or cache.load(home, key)
        if entry is None:
            reason = errors.get(key, f"nothing was written to {home}")
            results.append(CompileFailed(name=instance.name, arch=instance.arch, reason=reason))
            continue
        facts, files = entry
        results.append(Compiled(instance, files["binary"], files["assembly"], facts, key not in missing))
    return results


def write(compiled: Sequence[Compiled], folder: Path, records: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Writes binaries, assembly, the kernels' sources and kernels.json into `folder`; gives the records.

    `records` replaces the kernels' own, which name every op that a kernel could serve.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = list(records) or [kernel.record() for kernel in compiled]
    library: dict[str, None] = {}
    for kernel, record in zip(compiled, records, strict=True):
        (folder / record["cubin"]).write_bytes(kernel.binary)
        (folder / record["ptx"]).write_bytes(kernel.assembly)
        spec = kernel.instance.spec
        module = spec.function.partition(":")[0]
        if spec.source:
            (folder / f"{module}.py").write_text(header([kernel.instance]) + spec.source, encoding="utf-8")
        library.update(dict.fromkeys(imported(spec.source) if spec.source else modules_of(module)))
    for name in sorted(library):
        users = [k.instance for k in compiled if k.instance.spec.function.startswith(f"{name}:")]
        (folder / f"{name}.py").write_text(header(users) + path_of(name).read_text(encoding="utf-8"), encoding="utf-8")
    beside = folder / ".kernels.json.new"
    beside.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, folder / "kernels.json")
    return records
