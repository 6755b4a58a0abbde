"""benchmarks/attention_lengths.py: a row for each cache, number of threads and length, with the bytes of each."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest


def test_the_table_has_a_row_for_each_case(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    script = importlib.import_module("attention_lengths")
    monkeypatch.setattr(script, "POOL", 1 << 20)
    monkeypatch.setattr(script, "measure_read_bandwidth", lambda threads: 1e10)
    options = ["--heads", "3", "--lengths", "64,129", "--cache", "bf16,fp8", "--threads", "1", "--repeat", "1"]
    assert script.main([*options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["cache"], r["length"]) for r in rows] == [("bf16", 64), ("bf16", 129), ("fp8", 64), ("fp8", 129)]
    # FlashMLA's FP8 row: 512 elements, 4 scales of 4 bytes, a rotary key of 64 BF16 numbers.
    assert [r["mb"] * 1e6 / r["length"] for r in rows] == pytest.approx([1152, 1152, 656, 656])
    for r in rows:
        assert r["of_bound"] == pytest.approx(max(r["bytes_us"], r["flops_us"]) / r["us"])
    assert script.main(options) == 0
    assert capsys.readouterr().out.count("\n") == 5
