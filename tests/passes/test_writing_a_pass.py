"""The pass in docs/writing-a-pass.md runs as it stands there."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

import moec
from moec.ir import Module
from moec.passes.base import Context, Outcome, Pass
from moec.passes.manager import Manager, PassFailure
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


@dataclass(frozen=True)
class Rename(Pass):
    """Gives a function a name that the text form cannot hold."""

    name: ClassVar[str] = "rename"

    def run(self, module: Module, ctx: Context) -> Outcome:
        module.functions["decode"].name = "no name"
        return Outcome(1)


def test_a_pass_whose_module_does_not_parse_is_named() -> None:
    module = moec.trace("tiny-deepseek-v3").ir
    with pytest.raises(PassFailure, match="after pass rename: the printed module does not parse back: <text>:"):
        Manager(Context(load("cpu")), verify="roundtrip").run(module, [Rename()])
