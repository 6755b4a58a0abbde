"""docs/ir-from-scratch.md runs from top to bottom, and its assertions hold."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "ir-from-scratch.md"


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text()
    page = ModuleType("from_scratch")
    monkeypatch.setitem(sys.modules, "from_scratch", page)
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.S))
    assert len(blocks) > 15
    # Each block stands at its own line of the page, so that a failure points there.
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        source = "\n" * line + block.group(1)
        exec(compile("from __future__ import annotations\n" + source[1:], str(PAGE), "exec"), vars(page))
    assert sum(block.group(1).count("\n") for block in blocks) > 350
