"""One declaration per GPU kernel: what drives its interpreter test, compilation, launch, benchmark and documentation.

Sizes have two roles. *Dims* are the sizes of a problem (M, N, K, heads, experts); `constants(dims)` says which of
them, and what follows from them, a kernel holds as compile-time constants. A *tile* adds the block sizes, warps and
stages for an architecture and a shape class ("decode": few rows; "prefill": many; "any").
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moec.codegen.triton.arch import architecture
from moec.codegen.triton.errors import UnknownKernel, UnknownShapeClass, UnmetRequirement, UnsupportedKernel
from moec.errors import near
from moec.ir import Op, Value, WeightRef
from moec.ir.expr import evaluate
from moec.plugins import plugins

if TYPE_CHECKING:
    from moec.codegen.triton.problem import Expected, Problem
    from moec.targets import Target

Constant = int | bool | None
Dims = Mapping[str, int]


@dataclass(frozen=True)
class Tile:
    """Block sizes and options of one compiled form; `spills`: bytes of spill stores that are known and accepted."""

    constants: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    spills: int = 0

    @property
    def facts(self) -> tuple[object, ...]:
        """What tells tiles apart."""
        return (tuple(sorted(self.constants.items())), self.num_warps, self.num_stages)


TileTable = Mapping[str, Mapping[str, Tile]]


def on(architectures: tuple[str, ...], **shapes: Tile) -> dict[str, Mapping[str, Tile]]:
    """The same tiles for several architectures; tables of `on(...)` are joined with `|`."""
    return {arch: shapes for arch in architectures}


@dataclass(frozen=True)
class Case:
    """One problem to check a kernel on: dims over the spec's own, and element types over its signature's.

    `interpreted`: only there; float32 operands show the algorithm's own error, and no tile for them fits a device.
    """

    name: str
    dims: Dims = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False
    interpreted: bool = False


@dataclass(frozen=True)
class Use:
    """How a kernel computes an op: its run-time arguments and its dims.

    Values and weights stand for the addresses of their elements, rows behind one another without gaps; a number or an
    expression over the run-time symbols (`T` tokens, `B` sequences, ...) for itself.
    """

    arguments: Mapping[str, Value | WeightRef | int | float | str]
    dims: Mapping[str, int | str]


@dataclass(frozen=True)
class KernelSpec:
    """A kernel and all that is known about it.

    `signature` maps the run-time arguments, in order, to Triton types (`*bf16`, `i32`,
    `tensordesc<fp8e4nv[{BM}, 128]>`); `grid`, `flops`, `bytes` and `requires` are expressions over dims and
    constants; `build` makes the arguments of a problem and `reference` what they must become, in torch. `ops` names
    the IR operations that the kernel serves; `fallback` the kernel to use where `tiles` has no entry. `source` is the
    module's text where the kernel was generated, and empty where `function` names a file; `loose` names pointers that
    need not lie at a multiple of 16 bytes. With `serve` lowering takes the kernel for `ops` that it has no kernel for.
    `boxes`: pointers that a tile with the constant TMA turns into tensor descriptors, and their boxes. `menu`: tiles
    that may fit an instance by their predicted microseconds, the fastest first (fused/choice.py). `spares`:
    tiles for sizes at which the declared one spills or fails another check, in order.
    """

    name: str
    function: str
    ops: tuple[str, ...]
    summary: str
    signature: Mapping[str, str]
    dims: Dims
    constants: Callable[[Dims], Mapping[str, Constant]]
    tiles: TileTable
    grid: tuple[str, ...]
    build: Callable[[Problem], dict[str, Any]]
    reference: Callable[[Problem, dict[str, Any]], dict[str, Expected]]
    cases: tuple[Case, ...]
    flops: str
    bytes: str
    aligned: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    tensor_core: bool = False
    fallback: str = ""
    shape_dims: Mapping[str, Dims] = field(default_factory=dict)
    source: str = ""
    loose: tuple[str, ...] = ()
    serve: Callable[[Op], Use] | None = None
    boxes: Mapping[str, str] = field(default_factory=dict)
    menu: Callable[[Instance, Target], list[tuple[float, Tile]]] | None = None
    spares: tuple[Tile, ...] = ()

    def jit(self) -> Any:
        """The decorated Triton function. Imports Triton."""
        return load_function(self.function, self.source)

    def shapes(self, arch: str) -> Mapping[str, Tile]:
        """The tiles for `arch` by shape class. Raises UnknownArchitecture, UnsupportedKernel with the fallback."""
        known = architecture(arch)
        if arch not in self.tiles:
            fp8 = any("fp8" in kind for kind in self.signature.values())
            reason = "it needs FP8 matrix units" if fp8 and not known.fp8 else "no form of it compiles there"
            fallback = f"'{self.fallback}'" if self.fallback else "another target"
            raise UnsupportedKernel(name=self.name, arch=arch, reason=reason, fallback=fallback)
        return self.tiles[arch]

    def instance(self, arch: str, shape: str = "", **dims: int) -> Instance:
        """The kernel for `arch` with `dims` over the spec's own; no `shape` takes the first of the table.

        Raises UnknownArchitecture, UnsupportedKernel, UnknownShapeClass, UnmetRequirement.
        """
        shapes = self.shapes(arch)
        chosen = shape or next(iter(shapes))
        if chosen not in shapes:
            hint = near(chosen, list(shapes))
            raise UnknownShapeClass(name=self.name, shape=chosen, arch=arch, hint=hint)
        return Instance(self, arch, chosen, shapes[chosen], {**self.dims, **self.shape_dims.get(chosen, {}), **dims})


@dataclass(frozen=True)
class Instance:
    """A kernel fixed to an architecture, a tile and sizes: what is compiled, launched and timed."""

    spec: KernelSpec
    arch: str
    shape: str
    tile: Tile
    dims: Dims
    types: Mapping[str, str] = field(default_factory=dict)
    loose: tuple[str, ...] = ()
    """Arguments that this use does not keep at multiples of 16, beside the declaration's own."""
    origin: str = "declared"
    """Where the tile is from: declared, predicted with its microseconds, or measured on a device."""

    def __post_init__(self) -> None:
        for requirement in self.spec.requires:
            if not evaluate(requirement, self.values):
                names = {n: v for n, v in self.values.items() if n in requirement.replace("%", " ").split()}
                raise UnmetRequirement(name=self.spec.name, requirement=f"'{requirement}'", values=names)

    @property
    def name(self) -> str:
        return self.spec.name if self.shape == "any" else f"{self.spec.name}.{self.shape}"

    @property
    def constants(self) -> dict[str, Constant]:
        return {**self.spec.constants(self.dims), **self.tile.constants}

    @property
    def values(self) -> dict[str, Any]:
        return {**self.dims, **self.constants}

    @property
    def signature(self) -> dict[str, str]:
        """Run-time arguments and their types, block sizes filled in."""
        kinds = {**self.spec.signature, **self.types}
        if self.tile.constants.get("TMA"):
            kinds |= {n: f"tensordesc<{kinds[n].removeprefix('*')}{box}>" for n, box in self.spec.boxes.items()}
        return {name: kind.format(**self.constants) for name, kind in kinds.items()}

    def grid(self) -> tuple[int, ...]:
        return tuple(evaluate(axis, self.values) for axis in self.spec.grid)

    def flops(self) -> int:
        return evaluate(self.spec.flops, self.values)

    def bytes(self) -> int:
        """Bytes that have to pass between the device's memory and the kernel at least."""
        return evaluate(self.spec.bytes, self.values)


def with_tile(instance: Instance, tile: Tile, origin: str = "") -> Instance:
    """The same kernel with another tile. Raises UnmetRequirement for a tile that the sizes do not allow."""
    return replace(instance, tile=tile, origin=origin or instance.origin)


@lru_cache(maxsize=256)
def load_function(name: str, source: str) -> Any:
    """The decorated function `module:function` of `kernels/`, or of the given text. Imports Triton.

    Triton reads a function's text from its file, so a generated one is written to a temporary file that stays.
    """
    module, _, function = name.partition(":")
    if not source:
        inside = "" if "." in module else "moec.codegen.triton.kernels."
        return getattr(importlib.import_module(inside + module), function)
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    file = Path(_generated_folder().name) / f"{module}_{digest}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"moec_generated_{module}_{digest}", file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, function)


@lru_cache(maxsize=1)
def _generated_folder() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="moec-kernels-")


@lru_cache(maxsize=1)
def registry() -> Mapping[str, KernelSpec]:
    """Every kernel by name: built in, then those of installed packages (entry points `moec.gpu_kernels`)."""
    from moec.codegen.triton.specs import ALL

    kernels: dict[str, KernelSpec] = {}
    for spec in ALL:
        if spec.name in kernels:
            raise ValueError(f"two kernels are named {spec.name}")
        kernels[spec.name] = spec
    kernels.update(plugins("moec.gpu_kernels", kernels))
    return MappingProxyType(kernels)


def kernel(name: str) -> KernelSpec:
    """The kernel called `name`. Raises UnknownKernel."""
    if name not in registry():
        raise UnknownKernel(name=name, hint=near(name, list(registry())))
    return registry()[name]


def serving(op: str, arch: str) -> tuple[KernelSpec, ...]:
    """The kernels that serve the IR operation `op` on `arch`, most specialised type first, as declared."""
    architecture(arch)
    return tuple(spec for spec in registry().values() if op in spec.ops and arch in spec.tiles)


def instances(arch: str) -> tuple[Instance, ...]:
    """Every kernel that runs on `arch`, in every shape class, at the sizes of DeepSeek-V3."""
    architecture(arch)
    return tuple(
        spec.instance(arch, shape) for spec in registry().values() if arch in spec.tiles for shape in spec.tiles[arch]
    )
