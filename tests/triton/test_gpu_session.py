"""A benchmark run whose kernels raise, crash or hang: each loses one row, and the rest goes on."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
CHILD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import gpu_session
from gpu_session import Session

gpu_session.context_lives = lambda: {lives}
session = Session.opened(Path(sys.argv[1]), "checks", 1)
if "no set-up" in sys.argv:
    os.abort()


def hang():
    time.sleep(60)


def wrong():
    assert False, "3.2 of its bound"


things = dict(first=int, wrong=wrong, crash=os.abort, hang=hang, leave=lambda: os._exit(7), last=int)
for name, thing in session.left(things.items()):
    with session.attempt(name):
        thing()
        session.add("rows", name)
"""


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("gpu_session")
    monkeypatch.setattr(module, "LIMIT", 3.0)
    monkeypatch.setattr(module, "LIMITS", {"set-up": 120.0})
    return module


def started(session: Any, tmp_path: Path, lives: bool, *arguments: str, seconds: float = 300) -> tuple[bool, Any]:
    out = tmp_path / "out.json"
    session.save(out, {"arch": "sm_90a", "ends": time.time() + seconds})
    child = tmp_path / "child.py"
    child.write_text(CHILD.format(folder=str(FOLDER), lives=lives))
    whole = session.supervise([sys.executable, str(child), str(out), *arguments], out, "checks")
    return whole, json.loads(out.read_text())


@pytest.mark.parametrize("lives", [True, False])
def test_what_breaks_loses_one_row(session: Any, tmp_path: Path, lives: bool) -> None:
    """Whether or not the context survives an error that Python sees."""
    whole, result = started(session, tmp_path, lives)
    assert whole and result["rows"] == ["first", "last"] == result["done checks"]
    assert {f["name"]: f["reason"] for f in result["failures"]} == {
        "wrong": "AssertionError: 3.2 of its bound",
        "crash": "its process ended with signal 6",
        "hang": "nothing for 3 s: killed",
        "leave": "its process ended with status 7",
    }


def test_a_stage_that_cannot_begin_is_given_up(session: Any, tmp_path: Path) -> None:
    whole, result = started(session, tmp_path, True, "no set-up")
    assert not whole and [f["name"] for f in result["failures"]] == ["set-up"]


def test_out_of_time_says_what_was_not_reached(session: Any, tmp_path: Path) -> None:
    whole, result = started(session, tmp_path, True, seconds=-1)
    assert whole and result["not reached"] == ["checks: 6 of 6"] and "rows" not in result
