"""The pass in docs/writing-a-pass.md runs as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import moec
from moec.passes.base import Context, Pass
from moec.passes.manager import Manager
from moec.targets import load

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-pass.md"


def test_the_pass_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    page: Any = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    exec(code, vars(page))
    step: Pass = page.ScaleRouter(factor=1.5)
    module = moec.trace("tiny-deepseek-v3").ir
    manager = Manager(Context(load("cpu")), verify="roundtrip")
    manager.run(module, [step])
    assert [op.attrs["scale"] for _, op in module.ops() if op.name == "moe.route"] == [3.75, 3.75]
    assert manager.records[0].matched == 2
