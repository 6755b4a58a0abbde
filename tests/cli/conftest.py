"""The command line in this process, a small checkpoint, and one artifact that the tests share."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from folder_snapshot import snapshot
from small_checkpoint import write_model

from moec.cli import main


@dataclass
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


Moec = Callable[..., Outcome]


@pytest.fixture
def moec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Moec:
    """Runs `moec ARGS...` in this process; any exception but SystemExit is a failed test."""
    monkeypatch.setattr("signal.signal", lambda *args: None)

    def run(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["moec", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def refused(moec: Moec, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail with one line on stderr and change nothing below `tmp_path`; returns the line."""

    def run(*args: object, code: int = 2) -> str:
        before = snapshot(tmp_path)
        done = moec(*args)
        assert done.code == code, done
        assert done.out == ""
        assert done.err.startswith("moec: error: ") and done.err.count("\n") == 1, done.err
        assert snapshot(tmp_path) == before
        return done.err.removeprefix("moec: error: ").rstrip("\n")

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of CONFIG; do not change it."""
    return write_model(tmp_path_factory.mktemp("hf") / "small")


@pytest.fixture(scope="session")
def artifact(model_folder: Path) -> Path:
    """Its artifact; do not change it. The kernels of OPTIONS are in the cache behind it."""
    from moec.stages import trace

    plan = trace(str(model_folder)).optimize("cpu", context=32, chunk=8, recipe="fp32")
    return plan.compile(model_folder.parent / "small.moec").path


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))
