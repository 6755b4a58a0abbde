"""benchmarks/cpu_recipes.py: its table, rows of earlier runs, wrong names."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "cpu_recipes.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def row(recipe: str, perplexity: float, rate: float) -> dict[str, Any]:
    sizes = {"step_weight_bytes": 7e8, "weight_bytes": 4 << 30, "share_of_bound": 0.8}
    return {
        "recipe": recipe, "perplexity": perplexity, "prefill_tokens_per_s": 400.0, "decode_tokens_per_s": rate, **sizes
    }  # fmt: skip


def test_the_table_sets_perplexities_beside_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    table = importlib.import_module("cpu_recipes").table
    text = table("bench-4b", [row("mxfp4-experts", 20.4, 50.0), row("fp32", 20.0, 10.0)]).splitlines()
    assert [line.split()[0] for line in text[2:]] == ["fp32", "mxfp4-experts"]
    assert "+2.00%" in text[3] and "50.00" in text[3] and "80%" in text[3]


def test_an_unknown_recipe_is_named() -> None:
    done = run("--recipes", "weight-onyl")
    assert done.returncode == 2
    assert done.stderr.strip() == "no recipe 'weight-onyl' (did you mean weight-only?)"


@pytest.mark.slow
def test_a_small_run_adds_to_the_rows_of_a_file(tmp_path: Path) -> None:
    out = tmp_path / "recipes.json"
    for recipe in ("weight-only", "mxfp4-experts"):
        done = run("--small", "--recipes", recipe, "--work", str(tmp_path / "work"), "--json", str(out))
        assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [r["recipe"] for r in rows] == ["weight-only", "mxfp4-experts"]
    assert all(16 < r["perplexity"] < 18 and r["decode_tokens_per_s"] > 0 for r in rows)
    assert "mxfp4-experts" in done.stdout and "weight-only" in done.stdout
