"""Our launches beside those of Triton's own launcher, byte by byte, through a driver library that notes its calls.

`fake_cuda.c` is compiled with cuda.h as Triton ships it: a call that does not fit its declaration, or that the library
does not export by that name, fails here. What is compared: grid, block, shared memory, stream, launch attributes, and
every parameter at the width that the PTX declares, tensor maps with all that the driver is asked to encode.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generated import generated_names
from whole_models import compile_uncompiled

import moec
from moec.codegen.triton.program import Program
from moec.codegen.triton.spec import registry
from moec.runtime.artifact import open_artifact
from moec.runtime.cuda.engine import GpuEngine
from moec.runtime.model import Model

HERE = Path(__file__).parent
COMPILER = shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="Triton's launcher is C: no gcc here")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the library that stands in for the driver's."""
    folder = tmp_path_factory.mktemp("cuda")
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None and COMPILER is not None
    include = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    command = [COMPILER, "-shared", "-fPIC", "-Wall", "-Werror", f"-I{include}", str(HERE / "fake_cuda.c")]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


def launches(fake: Path, tmp_path: Path, target: str, recipe: str, names: list[str]) -> list[dict[str, Any]]:
    """What both launchers asked of the driver, for each kernel."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment |= {
        "LD_LIBRARY_PATH": str(fake), "TRITON_LIBCUDA_PATH": str(fake), "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TRITON_DISABLE_LINE_INFO": "1", "OMP_NUM_THREADS": "1",
        "FAKE_CAPABILITY": {"a100": "80", "b200": "100"}.get(target, "90"),
    }  # fmt: skip
    command = [sys.executable, str(HERE / "launcher_worker.py"), str(tmp_path / "notes"), target, recipe, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def compare(found: list[dict[str, Any]]) -> None:
    for launch in found:
        name = launch["kernel"]
        assert launch["same_binary"], name
        (theirs,), (ours,) = ([n for n in launch[who] if n.startswith("grid")] for who in ("triton", "ours"))
        assert ours == theirs, name
        # Triton asks for all the shared memory that there is, we for what the kernel takes.
        needs = int(re.search(r"shared (\d+)", ours)[1])  # type: ignore[index]
        asked = [int(n.split()[2]) for n in launch["ours"] if n.startswith("attribute 8 ")]
        assert asked == ([needs] if needs > 48 * 1024 else []), name


NAMES = {
    "h800": ["linear_add.decode", "moe_experts.decode", "norm_rms_rope_cache_append", "mla_decode_split", "draw"],
    "a100": ["linear_add.decode", "permutation_contiguous"],
}


@pytest.mark.parametrize("target", list(NAMES))
def test_launches_are_those_of_triton(fake: Path, tmp_path: Path, target: str) -> None:
    """Pointers, 32- and 64-bit integers, floats, tensor descriptors, and more shared memory than comes unasked."""
    recipe = "deepseek-v3" if target == "h800" else "weight-only"
    found = launches(fake, tmp_path, target, recipe, NAMES[target])
    compare(found)
    if target == "h800":
        kinds = {re.sub(r"^(\*|tensordesc).*", r"\1", kind) for launch in found for kind in launch["kinds"]}
        assert kinds >= {"*", "tensordesc", "i32", "i64", "fp32"}
        assert any(128 in launch["sizes"] for launch in found), "no tensor map was passed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "recipe"), [("h800", "deepseek-v3"), ("h800", "bf16"), ("b200", "deepseek-v3"), ("a100", "weight-only")]
)
def test_every_launch_is_that_of_triton(fake: Path, tmp_path: Path, target: str, recipe: str) -> None:
    arch = {"h800": "sm_90a", "b200": "sm_100a", "a100": "sm_80"}[target]
    declared = [n for n, spec in registry().items() if arch in spec.tiles and recipe != "bf16"]
    compare(launches(fake, tmp_path, target, recipe, [*generated_names(target, recipe), *declared]))


def test_the_engine_speaks_c(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of a whole model's run fits its declaration: weights, prompts, graphs, drawn tokens and timing."""
    monkeypatch.setattr(Program, "compile", compile_uncompiled)
    settings = {"num_hidden_layers": "2", "first_k_dense_replace": "1"}
    plan = moec.trace("tiny-deepseek-v3", settings).optimize("h800", batch=2, context=64, recipe="deepseek-v3")
    plan.compile(tmp_path / "m.moec", random_weights=0)
    artifact = open_artifact(tmp_path / "m.moec")
    library = ctypes.CDLL(str(fake / "libcuda.so.1"))
    library.fake_notes(str(tmp_path / "notes").encode())
    engine = GpuEngine(artifact, library=library)
    model = Model(artifact, engine=engine)
    # Nothing is computed: memory of inputs and outputs comes zeroed.
    assert not model.logits(np.array([[1, 2, 3]]), chunk=2).any()
    assert model.generate([[1, 2], [3]], 3, stop=()) == [[0, 0, 0], [0, 0, 0]]
    assert engine.timed_replay("decode")() == 1500.0 and engine.driver.name() == "fake"
    launched = [n for n in (tmp_path / "notes").read_text().splitlines() if n.startswith("grid")]
    blocks = {line.split(" shared")[0].split("block ")[1] for line in launched}
    assert len(launched) > 50 and blocks <= {"64 1 1", "128 1 1", "256 1 1"}
