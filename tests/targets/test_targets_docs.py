"""docs/targets.md stays true: its example files check, and every field and family of parameters is in it."""

from __future__ import annotations

import re
from pathlib import Path

from moec import targets
from moec.targets.fields import FIELDS, KINDS

TEXT = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")


def test_examples_check(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert examples
    for index, example in enumerate(examples):
        file = tmp_path / f"example{index}.yaml"
        file.write_text(example, encoding="utf-8")
        assert targets.check(str(file)) == []


def test_every_section_is_described() -> None:
    for path in FIELDS:
        if path in ("description",):
            continue
        section = path if path.count(".") == 0 else ".".join(path.split(".")[:2])
        assert f"`{section}" in TEXT, path
    for kind in KINDS:
        assert f"`{kind}`" in TEXT
