"""The fit finds parameters again, judges itself on unseen shapes, and writes a target file whole or not at all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moec import targets
from moec.cli import targets as command
from moec.errors import InputError, MoecError
from moec.targets.cost import op_time
from moec.targets.cost.fit import FAMILIES, fit_and_check, fit_family, folds, largest_unseen, shape, with_values

H100 = targets.load("h100")
PREFILL = next(family for family in FAMILIES if family.name == "mla_prefill")
HIDDEN_VALUES = {
    "calibration.mla_prefill.floor": 15e-6,
    "calibration.mla_prefill.compute": 0.45,
    "calibration.mla_prefill.memory": 0.5,
}


def measurements(noise: float = 0.0) -> list[dict[str, Any]]:
    """Rows "measured" on a machine with other parameters."""
    machine, jitter = with_values(H100, HIDDEN_VALUES, "made up"), random.Random(7)
    found = []
    for batch in (1, 4, 32):
        for tokens in (64, 256, 1024, 4096):
            for heads in (16, 128):
                row = {"op": "mla_prefill", "batch": batch, "new_tokens": tokens, "context": tokens, "heads": heads}
                time = op_time(row, machine).time_us * (1 + noise * jitter.uniform(-1, 1))
                found.append({**row, "time_us": time})
    return found


def test_parameters_are_found_again() -> None:
    fitted = fit_family(H100, PREFILL, measurements(), "test")
    for path, value in HIDDEN_VALUES.items():
        assert fitted.calibration[path].value == pytest.approx(value, rel=0.05)
        assert fitted.calibration[path].source == "test"
    other = "calibration.gemm_bf16.floor"
    assert fitted.calibration[other] == H100.calibration[other]


def test_noise_moves_parameters_little() -> None:
    fitted = fit_family(H100, PREFILL, measurements(noise=0.1), "test")
    for path, value in HIDDEN_VALUES.items():
        assert fitted.calibration[path].value == pytest.approx(value, rel=0.2)


def test_one_row_does_not_run_away() -> None:
    fitted = fit_family(H100, PREFILL, measurements()[:1], "test")
    for path in PREFILL.parameters:
        assert 0.25 < fitted.calibration[path].value / H100.calibration[path].value < 4


def test_splits_are_by_shape() -> None:
    rows = measurements() + measurements(noise=0.1)
    for seen, unseen in [*folds(rows, 5), largest_unseen(rows, H100)]:
        assert len(seen) + len(unseen) == len(rows)
        assert unseen
        assert not {shape(row) for row in seen} & {shape(row) for row in unseen}
    assert sum(len(unseen) for _, unseen in folds(rows, 5)) == len(rows)


@pytest.fixture
def app() -> typer.Typer:
    fresh = typer.Typer(pretty_exceptions_enable=False)
    command.register(fresh)
    return fresh


def test_calibrate_writes_a_target(app: typer.Typer, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "mine.yaml"
    rows.write_text("".join(json.dumps(row) + "\n" for row in measurements(noise=0.02)), encoding="utf-8")
    words = ["targets", "calibrate", "h800", "--rows", str(rows), "--out", str(out), "--source", "my H800", "--json"]
    report = json.loads(CliRunner().invoke(app, words).stdout)["families"]["mla_prefill"]
    assert report["median"] < 0.05 < report["median_before"]
    assert targets.check(str(out)) == []
    mine, h800 = targets.load(out), targets.load("h800")
    assert mine.device == h800.device
    assert mine.calibration["calibration.mla_prefill.compute"].source == "my H800"
    assert mine.calibration["calibration.mla_prefill.compute"].value == pytest.approx(0.45, rel=0.1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.yaml", "rows.jsonl"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"op": "gemm", "m": 1, "n": 1, "k": 1, "dtype": "bf16"}', "rows.jsonl:1: has no positive time_us"),
        ('{"op": "gemm", "m": 1, "n": 1, "k": 1, "dtype": "bf16", "time_us": -3}', "no positive time_us"),
        ('{"op": "gemm", "m": 1, "n": 1, "k": 1, "dtype": "bf16", "time_us": NaN}', "no positive time_us"),
        ('{"op": "gemm", "m": 1, "time_us": 3}', "rows.jsonl:1: gemm: missing n, k, dtype"),
        ('{"op": "all_reduce", "bytes": 8, "ranks": 2, "time_us": 3}', "no row belongs to a family"),
        ("nonsense", "rows.jsonl:1: not valid JSON"),
    ],
)
def test_wrong_measurements(app: typer.Typer, tmp_path: Path, line: str, words: str) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "mine.yaml"
    rows.write_text(line + "\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["targets", "calibrate", "h100", "--rows", str(rows), "--out", str(out)])
    assert isinstance(done.exception, InputError)
    assert words in str(done.exception)
    assert not out.exists()


def test_an_output_that_cannot_be_written(app: typer.Typer, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(measurements()[0]) + "\n", encoding="utf-8")
    out = tmp_path / "no" / "such" / "folder.yaml"
    done = CliRunner().invoke(app, ["targets", "calibrate", "h100", "--rows", str(rows), "--out", str(out)])
    assert isinstance(done.exception, MoecError)
    assert done.exception.exit_code == 1


def test_a_cpu_is_calibrated_by_the_rows_of_its_own_ops() -> None:
    """Products of widened FP8 and of BF16 weights share their parameters where there are no FP8 units."""
    cpu = targets.load("cpu")
    hidden = {
        "calibration.gemm_bf16.floor": 1.2e-6,
        "calibration.gemm_bf16.memory": 0.5,
        "calibration.stream.floor": 4e-7,
    }
    machine = with_values(cpu, hidden, "made up")
    rows: list[dict[str, Any]] = [
        {"op": "gemm", "m": m, "n": n, "k": k, "dtype": dtype}
        for m in (1, 4, 32) for n in (192, 768, 4096) for k in (256, 2048) for dtype in ("fp8_block", "bf16")
    ]  # fmt: skip
    rows += [{"op": "stream", "bytes": size} for size in (1000, 20_000, 400_000, 8_000_000)]
    measured = [{**row, "time_us": op_time(row, machine).time_us} for row in rows]
    fitted, report = fit_and_check(cpu, measured, "test")
    assert set(report) == {"gemm", "stream"}
    for path, value in hidden.items():
        assert fitted.calibration[path].value == pytest.approx(value, rel=0.15)
    assert report["gemm"]["median"] < 0.03 < report["gemm"]["median_before"]
