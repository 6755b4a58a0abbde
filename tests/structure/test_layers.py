"""Which way dependencies point, from the imports that the source files state."""

from __future__ import annotations

import subprocess
import sys

import pytest
from imports import Imports, chain, cycles, reached, read_imports, source

from moec.codegen.tvm.compile import generator

BASE = {"moec.__version__", "moec.errors", "moec.figures", "moec.files", "moec.plugins"}
LAYERS: dict[str, set[str]] = {
    "moec.__version__": set(),
    "moec.errors": set(),
    "moec.figures": set(),
    "moec.files": {"moec.errors"},
    "moec.plugins": {"moec.errors"},
    "moec.passes.scheduling": {"moec.errors"},
    "moec.ir": BASE,
    "moec.model_defs": BASE | {"moec.ir"},
    "moec.targets": BASE | {"moec.ir"},
    "moec.simulate": BASE | {"moec.ir", "moec.targets", "moec.passes.scheduling"},
    "moec.frontend": BASE | {"moec.ir", "moec.targets", "moec.model_defs"},
    "moec.passes": BASE | {"moec.ir", "moec.targets", "moec.passes.scheduling", "moec.simulate"},
    "moec.runtime": BASE | {"moec.ir", "moec.targets"},
    "moec.codegen": BASE | {"moec.ir", "moec.targets", "moec.runtime"},
}
"""What each part may import. Parts that are not listed (the face of the package, the commands) may import all of them.

Task graphs and their schedules stand in `passes` but below everything: the simulator replays them.
"""
HEAVY = ("torch", "tvm", "tvm_ffi", "triton", "onnx", "transformers")


@pytest.fixture(scope="module")
def imports() -> dict[str, Imports]:
    return read_imports()


def part(module: str) -> str:
    """The longest name in LAYERS that a module lies in; empty when it lies in none."""
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len, default="")


def test_the_imports_are_read(imports: dict[str, Imports]) -> None:
    assert "moec.ir.module" in imports["moec.ir.verify"].at_once
    assert "moec.ir.builder" in imports["moec.ir.rewrite"].later
    assert "moec.runtime.model" not in imports["moec.runtime.torch_module"].all  # for type checkers alone
    assert {part(name) for name in imports} - {""} == set(LAYERS) - {"moec.__version__"}


def test_dependencies_point_down(imports: dict[str, Imports]) -> None:
    wrong = []
    for name, found in imports.items():
        if own := part(name):
            others = {o for o in found.all if o.startswith("moec") and part(o) not in LAYERS[own] | {own}}
            wrong += [f"{name} imports {other}" for other in sorted(others)]
    assert not wrong


def test_models_are_declared_for_the_frontend_alone(imports: dict[str, Imports]) -> None:
    users = {part(n) or n for n, found in imports.items() if any(part(o) == "moec.model_defs" for o in found.all)}
    # `moec models` lists what is declared there.
    assert users == {"moec.model_defs", "moec.frontend", "moec.cli.models"}


def test_no_modules_import_each_other(imports: dict[str, Imports]) -> None:
    found = cycles({name: found.at_once for name, found in imports.items()})
    # The table of emitters and those who fill it: who has the one has the others.
    filled = [f"moec.codegen.tvm.emit{part}" for part in ("", "_attention", "_heads", "_moe", "_rows")]
    assert found == [filled]


def test_a_cycle_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]


@pytest.mark.parametrize(
    "parts, never",
    [
        (("moec.runtime",), ("moec.frontend", "moec.passes", "moec.codegen", "moec.simulate", "tvm", "triton")),
        (("moec.codegen.triton", "moec.runtime.cuda"), ("tvm", "moec.codegen.tvm")),
        (("moec.codegen.tvm",), ("triton", "moec.codegen.triton")),
        (("moec.ir", "moec.targets", "moec.model_defs"), ("tvm", "triton", "onnx", "transformers")),
    ],
)
def test_what_is_never_reached(imports: dict[str, Imports], parts: tuple[str, ...], never: tuple[str, ...]) -> None:
    edges = {name: found.all for name, found in imports.items()}
    start = {name for name in imports if f"{name}.".startswith(tuple(f"{p}." for p in parts))}
    origin = reached(start, edges)
    wrong = [name for name in origin if f"{name}.".startswith(tuple(f"{n}." for n in never))]
    assert not [chain(name, origin) for name in wrong]


def test_kernels_in_the_cache_are_those_of_this_generator(imports: dict[str, Imports]) -> None:
    """What generators of CPU kernels import is part of the key of what they made: an upgrade builds anew."""
    start = {name for name in imports if name.startswith("moec.codegen.tvm")}
    read = reached(start, {name: found.all for name, found in imports.items()})
    hashed = {path.resolve() for path in generator()}
    needed = {n for n in read if n.startswith(("moec.ir", "moec.codegen")) and n in imports}
    assert {"moec.ir.lane16", "moec.codegen.exchanged", "moec.codegen.tvm.linear"} <= needed
    assert not {name for name in needed if source(name) not in hashed}


@pytest.mark.parametrize("modules", ["moec, moec.ir, moec.targets, moec.passes.registry", "moec.runtime.cuda.engine"])
def test_imports_nothing_heavy(modules: str) -> None:
    code = f"import sys, {modules}; print(*(n for n in {HEAVY} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
