"""The stages of benchmarks/gpu.py from end to end without a GPU: torch's device is the host, kernels do nothing.

What they compute is checked elsewhere. Here every line of the run is: a first session on a GPU must not end in a
mistake of the script.
"""

from __future__ import annotations

import importlib
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standin import StandIn, fake_compile
from torch.overrides import TorchFunctionMode
from whole_models import compile_uncompiled

import moec
from moec.codegen.triton import aot, tiles
from moec.codegen.triton.program import Program
from moec.codegen.triton.spec import registry
from moec.runtime.cuda import driver

FOLDER = Path(__file__).parents[2] / "benchmarks"
SETTINGS = {"num_hidden_layers": "2", "first_k_dense_replace": "1"}
DECLARED = ("draw", "route_sigmoid_bias", "mla_decode_combine")


class OnTheHost(TorchFunctionMode):
    """Tensors that were asked for on the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {n: "cpu" if v == "cuda" else v for n, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class Idle(StandIn):
    """A device that launches nothing, for kernels of any artifact and tensors anywhere."""

    def cuModuleLoadData(self, out: Any, image: bytes) -> int:
        return 0

    def cuModuleGetFunction(self, out: Any, module: Any, symbol: bytes) -> int:
        return 0

    def cuLaunchKernel(self, *arguments: Any) -> int:
        return self.do(arguments[8], lambda: None)

    def inside(self, address: int, size: int = 1) -> int:
        return address


class Event:
    """A moment that took a millisecond."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 1.0


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The benchmark's module, with a small model in place of DeepSeek-V3."""
    monkeypatch.syspath_prepend(str(FOLDER))
    gpu, model, peers, tuning = (importlib.import_module(f"gpu{n}") for n in ("", "_model", "_peers", "_tune"))
    trace, try_compile = moec.trace, lambda wanted, **options: [fake_compile(i) for i in wanted]
    monkeypatch.setattr(moec, "trace", lambda name, settings: trace("tiny-deepseek-v3", SETTINGS))
    monkeypatch.setattr(Program, "compile", compile_uncompiled)
    monkeypatch.setattr(aot, "try_compile", try_compile)
    (tmp_path / "kernels.json").write_text("[]")
    monkeypatch.setattr(driver, "open_library", lambda: Idle(tmp_path))
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path / "cache"))
    for module in (gpu, model, tuning):
        monkeypatch.setattr(module, "BATCHES", (1, 2))
        monkeypatch.setattr(module, "CONTEXT", 256)
    few = {n: registry()[n] for n in DECLARED}
    monkeypatch.setattr(gpu, "registry", lambda: few)
    monkeypatch.setattr(
        gpu, "wanted", lambda target: [s.instance("sm_90a", "", **s.cases[0].dims) for s in few.values()]
    )
    monkeypatch.setattr(gpu, "FLUSH_BYTES", 1 << 16)
    monkeypatch.setattr(gpu, "EXPERTS", (16, 64, 32))
    monkeypatch.setattr(gpu, "compiled_experts", lambda *sizes, **gate: lambda x: x * 2)
    # Every fifth problem, and two other tiles of each kernel.
    problems, beside = gpu.generated_problems, tiles._beside
    monkeypatch.setattr(gpu, "generated_problems", lambda target: problems(target)[::5])
    monkeypatch.setattr(tiles, "_beside", lambda tile: itertools.islice(beside(tile), 2))
    monkeypatch.setattr(tiles, "MENU", 2)
    monkeypatch.setattr(peers, "compiled", lambda function, *arguments: lambda: function(*arguments))

    @contextmanager
    def captured(graph: Any) -> Iterator[None]:
        yield

    stream = SimpleNamespace(cuda_stream=7)
    for name, value in {
        "is_available": lambda: True, "get_device_capability": lambda: (9, 0), "get_device_name": lambda: "a host",
        "synchronize": lambda: None, "empty_cache": lambda: None, "current_stream": lambda: stream, "Event": Event,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "graph": captured,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.UntypedStorage, "cuda", lambda self: self.clone())
    with OnTheHost():
        yield gpu


def test_every_stage_ends(pretend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was computed, so checks fail, by their bounds alone; everything else has a row."""
    sessions = importlib.import_module("gpu_session")
    out = tmp_path / "out.json"
    sessions.save(out, {"arch": pretend.this_arch(), "machine": pretend.machine(), "ends": time.time() + 600})
    for stage in pretend.STAGES:
        assert pretend.inside(stage, out, 1) == 0, capsys.readouterr().err
        result = json.loads(out.read_text())
        result.setdefault("stages", []).append({"stage": stage, "seconds": 1.0})
        sessions.save(out, result)
        pretend.show(stage, result)
    wrong = [f for f in result["failures"] if f["stage"] != "checks" or " of its bound" not in f["reason"]]
    assert [f["name"] for f in wrong] == ["logits of a small model"] and "outside 0.06" in wrong[0]["reason"]
    assert len(result["checks"]) > 30
    assert [(s["label"], s["batch"]) for s in result["steps"]] == [
        ("decode", 1), ("decode", 2), ("decode with measured tiles", 1), ("decode with measured tiles", 2),
    ]  # fmt: skip
    assert {x["phase"] for x in result["launches"]} == {"prefill", "decode"} and len(result["launches"]) > 60
    rows = [r["kernel"] for r in result["rows"]]
    assert rows[:3] == [*DECLARED[:2], "mla_decode_combine"] and rows.count("routed experts") == 3
    assert result["rows"][0]["peers"] == {"torch argmax": 1000.0}
    said = capsys.readouterr().out
    assert "turn 1:" in said and "PREDICTED" in said and "not reached" not in result
