"""What of benchmarks/gpu.py runs without a GPU: its problems, what torch is given beside them, and the refusal."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standin import StandIn
from whole_models import compile_uncompiled

import moec
from moec.codegen.triton.program import Program, lower_module
from moec.codegen.triton.spec import Instance, registry
from moec.runtime.artifact import open_artifact
from moec.runtime.cuda.engine import GpuEngine
from moec.targets import load

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark_modules() -> Iterator[tuple[Any, Any]]:
    """benchmarks/gpu_timing.py and gpu_peers.py, with torch.compile left out: what is compiled runs eagerly."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(FOLDER))
    gpu, peers = importlib.import_module("gpu_timing"), importlib.import_module("gpu_peers")
    patch.setattr(peers, "compiled", lambda function, *arguments: lambda: function(*arguments))
    yield gpu, peers
    patch.undo()


def small(name: str) -> Instance:
    """A kernel's first test case, its rows shared evenly among experts or sequences as in the benchmark."""
    spec = registry()[name]
    instance = spec.instance("sm_90a", "", **spec.cases[0].dims)
    return replace(instance, dims={**instance.dims, "LOAD": -1}) if "LOAD" in instance.dims else instance


@pytest.mark.parametrize("name", list(registry()))
def test_problem_and_peers(benchmark_modules: tuple[Any, Any], name: str) -> None:
    gpu, peers = benchmark_modules
    instance = small(name)
    arguments = instance.spec.build(gpu.DeviceProblem(instance, torch.Generator(), "cpu"))
    assert set(arguments) == set(instance.signature)
    for _, peer in peers.PEERS.get(instance.spec.function, ()):
        peer(instance, arguments)()


@pytest.mark.parametrize("target", ["a100", "h800", "b200"])
def test_everything_timed_has_a_size(benchmark_modules: tuple[Any, Any], target: str) -> None:
    for instance in benchmark_modules[0].wanted(load(target)):
        assert all(n > 0 for n in instance.grid()), instance.name
        assert instance.bytes() > 0


@pytest.mark.parametrize(("rows", "experts"), [(5, 0), (256, 2)])
def test_products_at_published_shapes(benchmark_modules: tuple[Any, Any], rows: int, experts: int) -> None:
    """The same products at small sizes: their problems can be built, and torch's take them."""
    gpu, peers = benchmark_modules
    shapes = importlib.import_module("gpu_shapes")
    instance = shapes.product(shapes.KernelTable(load("h800"), {}), rows, 256, 384, True, experts)
    arguments = instance.spec.build(gpu.DeviceProblem(instance, torch.Generator(), "cpu"))
    assert set(arguments) == set(instance.signature) and instance.flops() == 2 * rows * 256 * 384
    for name, peer in peers.PEERS[instance.spec.function]:
        if "_scaled_mm" not in name:
            peer(instance, arguments)()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "gpu.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "no CUDA driver here (torch finds no GPU): run on a machine with an NVIDIA GPU, or compile for --target cpu"
    )


def test_a_predicted_step_grows_with_the_batch() -> None:
    """Bounds from the data sheet: more sequences never take less, a faster device takes less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        model = importlib.import_module("gpu_model")
        times = {name: [model.predicted_step(load(name), b)[0] for b in (1, 32, 128)] for name in ("h800", "b200")}
    assert all(t == sorted(t) for t in times.values())
    assert all(fast < slow for fast, slow in zip(times["b200"], times["h800"], strict=True))


def test_checks_of_every_form(benchmark_modules: tuple[Any, Any]) -> None:
    """A program's kernels at three sizes, experts with every load, products in the forms that were not chosen too."""
    gpu = importlib.import_module("gpu")
    names = [name for name, _ in gpu.generated_problems(load("h800"))]
    assert len(set(names)) == len(names)
    products = [n for n in names if n.startswith("linear_add.decode, 100 tokens")]
    assert any("TMA" in n for n in products) and any("TMA" not in n for n in products)
    assert any("WS" in n for n in names) and any("load 2" in n for n in names)


def test_a_layer_is_timed_as_the_program_launches_it(
    benchmark_modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the gate to the sum of the experts, captured once on a device that only notes launches."""
    model = importlib.import_module("gpu_model")
    monkeypatch.setattr(model, "CONTEXT", 128)
    monkeypatch.setattr(Program, "compile", compile_uncompiled)
    settings = {"num_hidden_layers": "2", "first_k_dense_replace": "1"}
    plan = moec.trace("tiny-deepseek-v3", settings).optimize("h800", batch=2, context=128, recipe="bf16")
    plan.compile(tmp_path / "m.moec", random_weights=0)
    program = lower_module(plan.ir, plan.context.target, vars(plan.context.limits))
    noted: list[str] = []
    monkeypatch.setattr(StandIn, "launch", lambda self, record, grid, arguments: noted.append(record["name"]))
    artifact = open_artifact(tmp_path / "m.moec")
    device = StandIn(artifact.path / "kernels")
    engine = GpuEngine(artifact, library=device)
    model.run_once(engine, "decode", 2)
    noted.clear()
    once = model.experts_timer(engine, program, "decode", 2, (engine.memory.arena, 16))
    once()
    layer = noted[: len(noted) // 2]
    assert noted == layer * 2 and not any("attn" in n or "mla" in n for n in layer)
    assert layer[0].startswith("moe_route") and "combine" in layer[-1] and "permutation_contiguous" in layer[2]


BARE = """
import sys
sys.path[:0] = [{folder!r}]


class NoTvm:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tvm", "tvm_ffi"):
            raise ImportError(name)


sys.meta_path.insert(0, NoTvm())
import gpu
from pathlib import Path
from moec.codegen.triton import aot
from moec.codegen.triton.spec import kernel

(found,) = aot.try_compile([kernel("permute").instance("sm_80")], jobs=1, folder=Path({cache!r}))
print(found.problems(), len(found.binary) > 1000, len(gpu.wanted(gpu.load("h100"))) > 30)
"""


def test_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    """A borrowed machine has torch and Triton, no TVM, and this package only as files: compiler processes find it."""
    others = [p for p in sys.path if p.endswith("site-packages")]
    environment = {"PYTHONPATH": os.pathsep.join(others), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    script = BARE.format(folder=str(FOLDER), cache=str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert done.stdout == "[] True True\n", done.stderr[-2000:]
