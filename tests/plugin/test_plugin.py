"""`examples/plugin`, installed by pip: its op, pass, model, kernels and target work through entry points alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import make_model

import moec
from moec.ir import print_module
from moec.plugins import BrokenPlugin, plugins

PACKAGE = Path(__file__).parents[2] / "examples" / "plugin"
LIMIT = 0.3


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the package is installed in; this process does not see it."""
    folder = tmp_path_factory.mktemp("installed")
    # pip builds beside the sources: a copy keeps the tree clean.
    copy = tmp_path_factory.mktemp("copy") / "plugin"
    subprocess.run(["cp", "-r", str(PACKAGE), str(copy)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(folder), str(copy)], check=True)
    return folder


def run(installed: Path, *args: object, code: int = 0, env: dict[str, str] | None = None) -> tuple[str, str]:
    """Output and errors of `python ARGS` where the package is installed."""
    environment = {**os.environ, "PYTHONPATH": str(installed), **(env or {})}
    done = subprocess.run(
        [sys.executable, *map(str, args)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout, done.stderr


def limited_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x).clamp(max=LIMIT), self.up_proj(x).clamp(-LIMIT, LIMIT)
    y: torch.Tensor = self.down_proj(torch.nn.functional.silu(gate) * up)
    return y


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the plugin's family, with the logits that transformers gives with bounded inputs."""
    path = tmp_path_factory.mktemp("hf")
    oracle = make_model("v3")
    oracle.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "limited_deepseek", "swiglu_limit": LIMIT}
    (path / "config.json").write_text(json.dumps(config))
    ids = np.random.default_rng(0).integers(0, 211, (1, 40))
    with torch.no_grad():
        plain = oracle(torch.tensor(ids)).logits
        for layer in oracle.model.layers:
            for mlp in (layer.mlp, getattr(layer.mlp, "shared_experts", None)):
                if mlp is not None and hasattr(mlp, "gate_proj"):
                    mlp.forward = limited_forward.__get__(mlp)
        limited = oracle(torch.tensor(ids)).logits
    assert (plain - limited).abs().max() > 0.1 * plain.std(), "the bound must matter"
    np.save(path / "ids.npy", ids)
    np.save(path / "logits.npy", limited.numpy())
    return path


def test_model_op_cpu_kernel_and_target(installed: Path, folder: Path, tmp_path: Path) -> None:
    """A checkpoint of the plugin's family, compiled for its target with its kernel, equals transformers."""
    out, _ = run(installed, Path(__file__).with_name("check_plugin.py"), folder, tmp_path)
    assert json.loads(out)["error"] < 1e-4


def test_pass_on_text(installed: Path, tmp_path: Path) -> None:
    """The pass by name with its option, on a module that knows nothing of it; the text with its op parses."""
    file = tmp_path / "m.ir"
    file.write_text(print_module(moec.trace("tiny-deepseek-v3").ir))
    spec = "limit-swiglu{limit=0.5}"
    out, _ = run(installed, "-m", "moec", "ir", "opt", file, "--pass", spec, "--verify", "roundtrip")
    assert out.count("swiglu.limited") == 4
    assert "{limit = 0.5}" in out
    assert ", limit-swiglu)" in out
    _, err = run(installed, "-m", "moec", "ir", "opt", file, "--pass", "limit-swiglu{limit=-1}", code=2)
    assert err == "moec: error: pass limit-swiglu: limit must be positive, got -1.0\n"
    limited = tmp_path / "limited.ir"
    limited.write_text(out)
    assert run(installed, "-m", "moec", "ir", "verify", limited)[0].endswith("functions\n")


def test_without_the_package_its_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.ir"
    file.write_text(
        "module @m {version = 1} {\n  func @f(%x: f32[T, 8]) {\n"
        "    %0 = swiglu.limited %x {limit = 1.0} : f32[T, 4]\n    return\n  }\n}\n"
    )
    _, err = run(tmp_path, "-m", "moec", "ir", "verify", file, code=2)
    assert ":3:10: unknown op swiglu.limited (did you mean swiglu" in err


def test_gpu_kernel(installed: Path) -> None:
    """In Triton's interpreter against torch in float64, where its source is found, and in a program for a GPU."""
    pytest.importorskip("triton")
    script = """
import json, sys
sys.path.insert(0, sys.argv[1])
import interp_fixes
interp_fixes.apply()
from moec.codegen.triton.aot import source_of
from moec.codegen.triton.problem import check, make
from moec.codegen.triton.spec import kernel, serving
spec = kernel("swiglu_limited")
assert spec in serving("swiglu.limited", "sm_90a")
assert "def swiglu_limited" in source_of(spec.function, spec.source)
import moec
from moec.codegen.triton.program import lower_module
plan = moec.trace("tiny-deepseek-v3").optimize("h800", phase="decode", recipe="bf16", passes=["limit-swiglu"])
program = lower_module(plan.ir, plan.context.target, vars(plan.context.limits), tiles={})
assert "swiglu.limited" in program.table.entries["swiglu_limited"].ops
print(json.dumps(max(max(check(make(spec, case, "sm_90a")).values()) for case in spec.cases)))
"""
    helpers = Path(__file__).parents[1] / "triton"
    out, _ = run(installed, "-c", script, helpers, env={"TRITON_INTERPRET": "1"})
    assert json.loads(out) < 1


def test_target_is_listed(installed: Path) -> None:
    assert "quiet-cpu" in run(installed, "-m", "moec", "targets", "list")[0]


@pytest.mark.parametrize(
    ("group", "entry", "message"),
    [
        ("moec.passes", "fuse = json:loads", "adds 'fuse' to moec.passes: this name exists already"),
        ("moec.passes", "x = nowhere:X", "adds 'x' to moec.passes: nowhere:X fails with ModuleNotFoundError"),
        ("moec.ops", "x = json:nothing", "adds 'x' to moec.ops: json:nothing fails with AttributeError"),
    ],
)
def test_broken_packages_are_named(tmp_path: Path, group: str, entry: str, message: str) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
    file = tmp_path / "m.ir"
    file.write_text("module @m {version = 1} {\n}\n")
    _, err = run(tmp_path, "-m", "moec", "ir", "opt", file, "--pass", "fuse", code=2)
    assert err.startswith(f"moec: error: the installed package broken {message}")
    assert len(err.splitlines()) == 1


def test_names_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    entries = [EntryPoint("a", "json:loads", "g"), EntryPoint("a", "json:dumps", "g")]
    monkeypatch.setattr("moec.plugins.entry_points", lambda group: entries)
    with pytest.raises(BrokenPlugin, match="exists already"):
        list(plugins("g"))
