"""docs/ir-reference.md is what the op table says."""

from __future__ import annotations

from pathlib import Path

from moec.ir import OPS
from moec.ir.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "ir-reference.md"


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == reference(), "run: moec ir reference --write docs/ir-reference.md"


def test_every_op_is_described() -> None:
    for name, op in OPS.items():
        assert op.__doc__, name
        assert f"#### `{name}`" in reference()
