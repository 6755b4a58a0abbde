"""`moec ir passes` lists every pass with options that a spec takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moec.passes.registry import PassSpecError, described, parse_pass, passes


def test_every_pass_is_described_and_its_options_parse() -> None:
    found = described()
    assert [p.name for p in found] == list(passes())
    for p in found:
        assert p.does.endswith(".") and "\n" not in p.does
        plain = {o: d for o, (_, d) in p.options.items() if "," not in d}
        assert parse_pass(f"{p.name}{{{','.join(f'{o}={d}' for o, d in plain.items())}}}") == parse_pass(p.name)


def test_the_command_lists_them() -> None:
    done = subprocess.run([sys.executable, "-m", "moec", "ir", "passes", "--json"], capture_output=True, text=True)
    rows = json.loads(done.stdout)["passes"]
    assert [r["name"] for r in rows] == list(passes())
    assert next(r for r in rows if r["name"] == "overlap")["options"]["pieces"] == {"type": "int", "default": "4"}


def test_an_unknown_pass_leads_to_the_list() -> None:
    with pytest.raises(PassSpecError, match="moec ir passes lists them"):
        parse_pass("nonsense")
