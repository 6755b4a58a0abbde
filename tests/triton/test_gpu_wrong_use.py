"""What keeps a GPU artifact from running, one line each; and tuning, on a stand-in whose clock prefers one tile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from standin import StandIn, fake_compile
from whole_models import compile_uncompiled

import moec
from moec.codegen.triton import aot, tiles
from moec.codegen.triton.program import Program, lower_module
from moec.codegen.triton.tune import tune
from moec.errors import MoecError
from moec.runtime.artifact import Artifact, open_artifact
from moec.runtime.cuda.engine import GpuEngine, buckets
from moec.runtime.cuda.errors import DamagedKernel, DriverTooOld, OutOfMemory, WrongArchitecture
from moec.runtime.errors import MalformedFile, WrongHash

SMALL = {"num_hidden_layers": "2", "first_k_dense_replace": "1"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("gpu") / "m.moec"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compile", compile_uncompiled)
        plan = moec.trace("tiny-deepseek-v3", SMALL).optimize("h800", batch=3, context=128, recipe="bf16")
        plan.compile(out, random_weights=0)
    return open_artifact(out)


@pytest.mark.parametrize(
    ("device", "error", "said"),
    [
        ({"capability": (8, 0)}, WrongArchitecture, "is built for sm_90a, this device is sm_80: compile again"),
        ({"capability": (10, 0)}, WrongArchitecture, "is built for sm_90a, this device is sm_100: compile again"),
        ({"version": 11040}, DriverTooOld, "it speaks CUDA 11.4, the kernels need 12.0"),
        ({"memory": 1 << 20}, OutOfMemory, "not enough GPU memory for "),
    ],
)
def test_a_device_that_cannot(artifact: Artifact, device: Any, error: Any, said: str) -> None:
    with pytest.raises(error) as caught:
        GpuEngine(artifact, library=StandIn(artifact.path / "kernels", **device))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [["run", "--prompt-ids", "1,2"], ["tune"], ["bench"]])
def test_a_machine_without_a_gpu(artifact: Artifact, command: list[str]) -> None:
    """On a machine with one these commands work: the line is asked for only where there is none."""
    name, *options = command
    call = [sys.executable, "-m", "moec", name, str(artifact.path), *options]
    done = subprocess.run(call, capture_output=True, text=True, env={"PATH": "", "LD_LIBRARY_PATH": ""})
    if done.returncode:
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("moec: error: no CUDA driver here")


def test_a_changed_kernel_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy.moec"
    shutil.copytree(artifact.path, copy)
    cubin = next((copy / "kernels").glob("*.cubin"))
    cubin.write_bytes(cubin.read_bytes() + b"x")
    with pytest.raises(WrongHash):
        open_artifact(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p["programs"]["decode"]["steps"].append({"grid": []}), "kernel is missing"),
        (lambda p: p["cache"].update(shape=[2, 1, 64, 144]), "has not the 7 pages of 3 full sequences"),
        (lambda p: p.update(programs={}), "programs must be prefill, decode or both"),
        (lambda p: p["programs"]["decode"]["steps"][0].update(grid=["T +"]), "expression"),
        (lambda p: p["programs"]["decode"].update(max_tokens=1), "takes less than the batch of 3"),
    ],
)
def test_a_wrong_plan_is_one_line(artifact: Artifact, change: Any, said: str) -> None:
    from moec.runtime.cuda.program import parse_gpu_plan

    plan = json.loads((artifact.path / "plan.json").read_text())
    change(plan)
    with pytest.raises(MalformedFile) as caught:
        parse_gpu_plan(json.dumps(plan).encode(), "plan.json", artifact.manifest)
    assert said in str(caught.value)


def test_a_kernel_that_is_not_listed(artifact: Artifact) -> None:
    engine = GpuEngine(artifact, library=StandIn(artifact.path / "kernels"))
    executor = engine._phases["decode"]
    executor.kernels = {}
    with pytest.raises(DamagedKernel, match=r"kernels\.json does not list it"):
        list(executor.actions({"T": 1, "R": 1, "B": 1, "N": 2, "S": 1, "C": 1}))


def test_a_plan_only_folder_and_other_devices(tmp_path: Path) -> None:
    moec.trace("tiny-deepseek-v3").optimize("h800").save(tmp_path / "p")
    with pytest.raises(MoecError, match="it is a plan only"):
        moec.load(tmp_path / "p")


def test_buckets() -> None:
    assert buckets(1) == [1] and buckets(8) == [1, 2, 4, 8] and buckets(100) == [1, 2, 4, 8, 16, 32, 64, 100]


class Clock(StandIn):
    """Launches take no time to simulate; those with 3 stages are the fastest on its clock."""

    def __init__(self, kernels: Path) -> None:
        super().__init__(kernels)
        self.loaded: dict[bytes, Any] = {}

    def known(self, image: bytes) -> Any:
        return self.loaded.get(image) or super().known(image)

    def launch(self, record: Any, grid: Any, arguments: Any) -> None:
        self.last = record

    def milliseconds(self, record: Any) -> float:
        return 0.5 if record["launch"]["stages"] == 3 else 1.0


def test_tuning_keeps_what_the_clock_prefers(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Winners go into the table with their source, and the next lowering takes them."""
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    device = Clock(artifact.path / "kernels")

    def compiled(wanted: Any, jobs: int) -> list[Any]:
        made = [fake_compile(i) for i in wanted]
        device.loaded.update({k.binary: k.record() for k in made})
        return made

    monkeypatch.setattr(aot, "try_compile", compiled)
    engine = GpuEngine(artifact, library=device)
    plan = moec.trace("tiny-deepseek-v3", SMALL).optimize("h800", batch=3, context=128, recipe="bf16", phase="decode")
    limits = vars(plan.context.limits)
    results, found = tune(engine, plan.ir, plan.context.target, limits, "measured on a stand-in", repeats=1)
    assert results and all(r.tried > 3 for r in results)
    assert found and all(m.tile.num_stages == 3 and m.microseconds < m.declared_microseconds for m in found.values())
    file = tiles.save("sm_90a", found)
    assert "measured on a stand-in" in file.read_text()
    program = lower_module(plan.ir, plan.context.target, limits)
    assert program.table.measured >= len(found)
    taken = [e.instance for e in program.table.entries.values() if e.instance.origin == "measured on a stand-in"]
    assert taken and {i.tile.num_stages for i in taken} == {3}
    file.write_text("{")
    assert tiles.load("sm_90a") == {}
