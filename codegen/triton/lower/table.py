"""The kernels of a program: equal ones are one, each has a name that says what it does."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moec.codegen.triton.aot import aligned
from moec.codegen.triton.fused.binding import Generated
from moec.codegen.triton.fused.declare import product_spec, rows_spec
from moec.codegen.triton.fused.products import Product
from moec.codegen.triton.spec import Instance, KernelSpec, with_tile
from moec.codegen.triton.tiles import Measured, key_of
from moec.ir import Op
from moec.ir.expr import substitute
from moec.ir.printer import print_op
from moec.targets import Target

_MOST = 48


@dataclass
class Entry:
    """A kernel of the program, the ops that it computes by function and position in its text, and as they read."""

    instance: Instance
    texts: list[str] = field(default_factory=list)
    uses: dict[str, set[int]] = field(default_factory=dict)
    ops: set[str] = field(default_factory=set)


@dataclass
class KernelTable:
    """Kernels of all phases for one architecture, in the order in which they were first needed."""

    target: Target
    tiles: Mapping[str, Measured] = field(default_factory=dict)
    """Measured tiles by `tiles.key_of`, in place of predicted and declared ones."""
    refused: Collection[tuple[str, object]] = ()
    """Predicted and declared tiles, by the same keys, that turned out not to compile as they should."""
    entries: dict[str, Entry] = field(default_factory=dict)
    measured: int = 0
    """How often a measured tile was taken."""
    _names: dict[str, str] = field(default_factory=dict)

    def generated(self, kernel: Generated, shape: str, product: Product | None = None, **dims: int) -> Instance:
        """The instance of a generated kernel, named after its ops; the same text and tile give the same kernel."""
        stem = _stem(kernel.ops)
        anonymous = replace_name(kernel, "kernel")
        key = json.dumps([anonymous.source, [(a.name, a.kind) for a in kernel.arguments]])
        if key not in self._names:
            count = 1 + sum(n == stem or re.fullmatch(re.escape(stem) + r"_\d+", n) is not None
                            for n in self._names.values())  # fmt: skip
            self._names[key] = stem if count == 1 else f"{stem}_{count}"
        named = replace_name(kernel, self._names[key])
        spec = rows_spec(named) if product is None else product_spec(named, product)
        return self.instance(spec, shape, **dims)

    def instance(self, spec: KernelSpec, shape: str, **dims: int) -> Instance:
        """The spec at the shape class of the phase, or at its first where it has one only."""
        shapes = spec.shapes(self.arch)
        chosen = spec.instance(self.arch, shape if shape in shapes else "", **dims)
        if not self.tiles and not self.refused and spec.menu is None:
            return chosen
        key = key_of(chosen)
        if key in self.tiles:
            self.measured += 1
            return with_tile(chosen, self.tiles[key].tile, self.tiles[key].source)
        if spec.menu is None:
            left = [t for t in (chosen.tile, *spec.spares) if (key, t.facts) not in self.refused]
            return with_tile(chosen, left[0]) if left else chosen
        for us, tile in spec.menu(chosen, self.target):
            if (key, tile.facts) not in self.refused:
                return with_tile(chosen, tile, f"predicted: {us:.1f} us on {self.target.name}")
        return chosen

    @property
    def arch(self) -> str:
        """The architecture that kernels are compiled for."""
        return self.target.device.arch

    def refusable(self, instances: Sequence[Instance]) -> set[tuple[str, object]]:
        """The tiles of kernels that failed, where another can take the place of each; else none."""
        if not all(i.origin.startswith("predicted") or (i.spec.spares and i.origin == "declared") for i in instances):
            return set()
        return {(key_of(i), i.tile.facts) for i in instances}

    def add(self, instance: Instance, function: str, ops: Sequence[tuple[int, Op]]) -> str:
        """Count a use of a kernel by ops of a function; returns the kernel's name in kernels.json."""
        name, number = instance.name, 2
        while name in self.entries and not _same(self.entries[name].instance, instance):
            name, number = f"{instance.name}-{number}", number + 1
        entry = self.entries.setdefault(name, Entry(instance))
        entry.uses.setdefault(function, set()).update(i for i, _ in ops)
        entry.ops.update(op.name for _, op in ops)
        text = "\n".join(f"  {print_op(op)}" for _, op in sorted(ops, key=lambda o: o[0]))
        entry.texts.append(f"@{function}\n{text}")
        return name

    def support(self, instance: Instance) -> str:
        """Add a kernel that the runtime launches by itself, for no op of the program; returns its name."""
        self.entries.setdefault(instance.name, Entry(instance, ops=set(instance.spec.ops)))
        return instance.name


def _same(a: Instance, b: Instance) -> bool:
    def facts(i: Instance) -> Any:
        return (i.spec.function, i.spec.source, i.signature, i.constants, i.tile, sorted(aligned(i)))

    return bool(facts(a) == facts(b))


def replace_name(kernel: Generated, name: str) -> Generated:
    """The same kernel under another name."""
    return replace(kernel, name=name, source=kernel.source.replace(f"def {kernel.name}(", f"def {name}(", 1))


def grid_of(instance: Instance, sizes: dict[str, int | str]) -> list[str]:
    """The launch's grid over the run-time symbols."""
    known: dict[str, int | str] = {n: v for n, v in instance.constants.items() if type(v) is int}
    return [substitute(axis, {**instance.dims, **known, **sizes}) for axis in instance.spec.grid]


def _stem(ops: Sequence[Op]) -> str:
    names = list(dict.fromkeys(op.name for op in ops))
    stem = re.sub(r"\W+", "_", "_".join(names))
    return stem if len(stem) <= _MOST else stem[:_MOST].rsplit("_", 1)[0]
