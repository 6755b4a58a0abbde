"""The row forms of `moec cost`, and one clear line for each wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moec import targets
from moec.cli import cost as command
from moec.errors import InputError
from moec.targets.cost import OPS, Cost, UnknownOp, WrongRow, op_time

H800 = targets.load("h800")

ROWS: list[dict[str, Any]] = [
    {"op": "gemm", "m": 128, "n": 4096, "k": 7168, "dtype": "fp8_block"},
    {"op": "gemm", "m": 128, "n": 4096, "k": 7168, "dtype": "fp8_block", "quantise_a": True, "time_us": 3.0},
    {"op": "gemm", "m": 1, "n": 1, "k": 1, "dtype": "fp8"},
    {"op": "grouped_gemm", "groups": 4, "m_per_group": 256, "n": 4096, "k": 7168, "dtype": "fp8_block"},
    {"op": "grouped_gemm", "groups": 3, "m_per_group": [5, 0, 900], "n": 4096, "k": 7168, "dtype": "bf16"},
    {"op": "mla_decode", "batch": 128, "context": 4096, "heads": 128, "kv_dtype": "bf16"},
    {"op": "mla_decode", "batch": 1, "context": 1, "heads": 16, "kv_dtype": "fp8", "queries": 2},
    {"op": "mla_prefill", "batch": 1, "new_tokens": 4096, "context": 4096, "heads": 128},
    {"op": "mla_prefill", "batch": 1, "new_tokens": 512, "context": 4096, "heads": 128, "form": "plain"},
    {"op": "moe_experts", "rows": 512, "experts": 8, "hidden": 7168, "inter": 2048, "dtype": "fp8_block",
     "layout": "masked"},
    {"op": "moe_dispatch", "tokens": 128, "hidden": 7168, "top_k": 8, "experts": 256, "ep": 32,
     "mode": "low_latency", "dtype": "fp8"},
    {"op": "moe_dispatch", "tokens": 128, "hidden": 7168, "top_k": 8, "experts": 256, "ep": 32,
     "mode": "low_latency", "dtype": "fp8_block"},
    {"op": "moe_combine", "tokens": 4096, "hidden": 7168, "top_k": 8, "experts": 256, "ep": 64,
     "mode": "normal", "dtype": "bf16"},
    {"op": "all_reduce", "bytes": 1 << 23, "ranks": 8},
    {"op": "all_gather", "bytes": 1 << 23, "ranks": 16},
    {"op": "reduce_scatter", "bytes": 0, "ranks": 2},
    {"op": "all_to_all", "bytes": 1 << 23, "ranks": 144},
    {"op": "router", "tokens": 128, "hidden": 7168, "experts": 256},
    {"op": "quantise", "rows": 128, "columns": 7168},
    {"op": "stream", "bytes": 10_000_000},
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["op"])
@pytest.mark.parametrize("name", ["h800-ep144", "h20", "a100", "gb200-nvl72", "mi300x"])
def test_row_forms(row: dict[str, Any], name: str) -> None:
    found = op_time(row, targets.load(name))
    assert 0 < found.time_us < 1e6
    assert found.bound in ("compute", "memory", "network", "latency")
    assert found.time_us >= 0.99 * max(found.parts.values())
    answer = json.loads(json.dumps(found.as_json()))
    assert {"time_us", "bound", "flops", "bytes", "sent_bytes"} <= set(answer)


@pytest.mark.parametrize("row", [r for r in ROWS if "ep" not in r and "ranks" not in r], ids=lambda r: r["op"])
def test_a_cpu_has_costs_too(row: dict[str, Any]) -> None:
    assert op_time(row, targets.load("cpu")).time_us > 0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "unknown op None"),
    ({"op": "gem"}, "did you mean gemm?"),
    ({"op": 7}, "unknown op 7"),
    ({"op": ["gemm"]}, "unknown op"),
    ({"op": "gemm", "m": 1, "n": 1}, "missing k, dtype"),
    ({"op": "gemm", "m": 0, "n": 1, "k": 1, "dtype": "bf16"}, "m is 0; it must be a whole number from 1"),
    ({"op": "gemm", "m": 1.5, "n": 1, "k": 1, "dtype": "bf16"}, "m is 1.5"),
    ({"op": "gemm", "m": "8", "n": 1, "k": 1, "dtype": "bf16"}, "m is '8'"),
    ({"op": "gemm", "m": True, "n": 1, "k": 1, "dtype": "bf16"}, "m is True"),
    ({"op": "gemm", "m": 1 << 60, "n": 1, "k": 1, "dtype": "bf16"}, "whole number from 1 to 2"),
    ({"op": "gemm", "m": None, "n": 1, "k": 1, "dtype": "bf16"}, "m is None"),
    ({"op": "gemm", "m": 1, "n": 1, "k": 1, "dtype": "fp4"}, "dtype is 'fp4'; it must be one of bf16, fp8"),
    ({"op": "gemm", "m": 1, "n": 1, "k": 1, "dtype": ["bf16"]}, "must be one of"),
    ({"op": "gemm", "m": 1, "n": 1, "k": 1, "dtype": "bf16", "quantise_a": 1}, "true or false"),
    ({"op": "gemm", "m": 1, "n": 1, "k": 1, "dtype": "bf16", "quantize_a": True}, "did you mean quantise_a?"),
    ({"op": "mla_prefill", "batch": 1, "new_tokens": 9, "context": 8, "heads": 1}, "at least new_tokens (9)"),
    ({"op": "grouped_gemm", "groups": 2, "m_per_group": [1], "n": 1, "k": 1, "dtype": "bf16"}, "1 numbers for 2"),
    ({"op": "grouped_gemm", "groups": 1, "m_per_group": [0], "n": 1, "k": 1, "dtype": "bf16"}, "all zero"),
    ({"op": "grouped_gemm", "groups": 1, "m_per_group": [-1], "n": 1, "k": 1, "dtype": "bf16"}, "m_per_group[0]"),
    ({"op": "moe_dispatch", "tokens": 1, "hidden": 1, "top_k": 9, "experts": 8, "ep": 8}, "more than experts"),
    ({"op": "all_reduce", "bytes": -1, "ranks": 8}, "bytes is -1"),
]


@pytest.mark.parametrize(("row", "words"), WRONG)
def test_wrong_rows(row: dict[str, Any], words: str) -> None:
    with pytest.raises((UnknownOp, WrongRow)) as caught:
        op_time(row, H800)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_costs_add_up() -> None:
    one = op_time(ROWS[0], H800)
    two = one + one
    assert two == one * 2
    assert two.time_us == 2 * one.time_us
    assert two.bound == one.bound
    assert Cost(0.0) + one == one


@pytest.fixture
def app() -> typer.Typer:
    fresh = typer.Typer(pretty_exceptions_enable=False)
    command.register(fresh)
    fresh.callback()(lambda: None)
    return fresh


def test_rows_in_the_order_of_the_input(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["cost", "--rows", str(file), "--target", "h800"])
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [a["op"] for a in answers] == [r["op"] for r in ROWS]
    assert [a["time_us"] for a in answers] == [op_time(row, H800).time_us for row in ROWS]


def test_one_op(app: typer.Typer) -> None:
    words = ["cost", "gemm", "m=128", "n=4096", "k=7168", "dtype=fp8_block", "--json", "--target", "h20"]
    answer = json.loads(CliRunner().invoke(app, words).stdout)
    assert answer["time_us"] == op_time(ROWS[0], targets.load("h20")).time_us
    words = ["cost", "grouped_gemm", "groups=3", "m_per_group=5,0,900", "n=4096", "k=7168", "dtype=bf16"]
    assert "bound" in CliRunner().invoke(app, words).stdout
    assert all(name in CliRunner().invoke(app, ["cost"]).stdout for name in OPS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"op": "gemm"', "rows.jsonl:2: not valid JSON"),
        ("[1]", "rows.jsonl:2: must be a JSON object"),
        ('{"op": "gemm", "m": 1}', "rows.jsonl:2: gemm: missing n, k, dtype"),
        ('{"op": "fly"}', "rows.jsonl:2: unknown op 'fly'"),
        ("[" * 100_000, "rows.jsonl:2: not valid JSON"),
    ],
)
def test_wrong_lines(app: typer.Typer, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n" + text + "\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["cost", "--rows", str(file)])
    assert isinstance(done.exception, InputError)
    assert done.exception.exit_code == 2
    assert words in str(done.exception)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gemm", "m"], "'m' is not key=value"),
        (["gemm", "m=1", "m=2"], "given twice"),
        (["gemm", "--rows", "x.jsonl"], "not both"),
        (["--rows", "/nowhere/x.jsonl"], "cannot be read"),
        (["gemm", "m=1", "--target", "h8000"], "did you mean h800"),
    ],
)
def test_wrong_usage(app: typer.Typer, arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["cost", *arguments])
    assert isinstance(done.exception, InputError)
    assert words in str(done.exception)


def test_communication_needs_links() -> None:
    with pytest.raises(targets.NoLink, match="scale-out"):
        op_time({"op": "all_reduce", "bytes": 8, "ranks": 2}, targets.load("cpu"))
