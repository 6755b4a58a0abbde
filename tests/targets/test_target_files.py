"""Shipped targets load, every number has a source, and what is shown loads again."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from moec import targets
from moec.cli import targets as command
from moec.targets import describe, units
from moec.targets.cost import op_time
from moec.targets.detect import detect
from moec.targets.fields import FIELDS
from moec.targets.load import merged_leaves
from moec.targets.parameters import PARAMETERS
from moec.targets.read_bandwidth import measure_read_bandwidth

SHIPPED = [
    "a100",
    "b200",
    "cpu",
    "gb200-nvl72",
    "h100",
    "h20",
    "h200",
    "h800",
    "h800-2048",
    "h800-ep144",
    "h800-ep32",
    "h800-ep320",
    "mi300x",
]


def test_names() -> None:
    assert targets.names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_number_has_a_source(name: str) -> None:
    for path, leaf in merged_leaves(name).items():
        if isinstance(leaf.value, float):
            assert len(leaf.source) > 5, path
        assert path in FIELDS or path in PARAMETERS


@pytest.mark.parametrize("name", SHIPPED)
def test_shown_file_loads_to_the_same_target(name: str, tmp_path: Path) -> None:
    file = tmp_path / "copy.yaml"
    file.write_text(describe.as_yaml(name, describe.leaves_of(name)), encoding="utf-8")
    assert targets.check(str(file)) == []
    assert targets.load(file) == targets.load(name)


def test_h800_is_an_h100_but_for_nvlink() -> None:
    h100, h800 = targets.load("h100"), targets.load("h800")
    assert h800.scale_up().bandwidth == 200e9
    assert h100.scale_up().bandwidth == 450e9
    assert h800.device.memory_bandwidth == h100.device.memory_bandwidth == 3.35e12
    assert h800.device.matrix_rates["fp8"] == h100.device.matrix_rates["fp8"] == 1978.9e12
    assert h800.calibration == h100.calibration


def test_cluster_sizes() -> None:
    sizes = {"h800-ep32": (32, 4), "h800-ep144": (144, 18), "h800-ep320": (320, 40), "h800-2048": (2048, 256)}
    for name, (ranks, nodes) in sizes.items():
        target = targets.load(name)
        assert (target.cluster.ranks, target.nodes) == (ranks, nodes)
    assert targets.load("h800-ep144").with_ranks(96).nodes == 12
    assert targets.load("h20").node.scale_out_per_device == 25e9


@pytest.mark.parametrize(("ranks", "words"), [(0, "at least one"), (12, "such as 8 or 16"), (-8, "at least one")])
def test_wrong_ranks(ranks: int, words: str) -> None:
    with pytest.raises(targets.WrongRanks, match=words):
        targets.load("h800").with_ranks(ranks)


def test_no_second_node_without_a_network() -> None:
    with pytest.raises(targets.WrongRanks, match="scale_out"):
        targets.load("cpu").with_ranks(2)
    with pytest.raises(targets.NoLink, match="scale-up"):
        targets.load("cpu").scale_up()


def test_types_without_matrix_units_are_widened() -> None:
    a100, cpu = targets.load("a100").device, targets.load("cpu").device
    assert not a100.fp8.matrix
    assert a100.compute_type("fp8") == "bf16"
    assert a100.matrix_rate("fp8") == 312e12
    assert cpu.matrix_rate("fp8") == cpu.matrix_rate("bf16") >= cpu.matrix_rate("fp32")


def test_cpu_is_this_machine() -> None:
    found = detect()
    target = targets.load("cpu")
    assert target.device.cores == found.cores >= 1
    assert target.device.vector_bits in (128, 256, 512)
    assert target.device.memory_bytes > 1e8
    assert "assumed" in target.sources["device.memory.bandwidth"]


def test_read_bandwidth_is_measured() -> None:
    assert 1e8 < measure_read_bandwidth(threads=1, size=8 << 20, rounds=1) < 1e13


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("3.35 TB/s", "bandwidth", 3.35e12),
        ("400 Gb/s", "bandwidth", 50e9),
        ("400Gbit/s", "bandwidth", 50e9),
        ("227 KiB", "bytes", 227 * 1024),
        ("80 GB", "bytes", 80e9),
        ("1.5 us", "time", 1.5e-6),
        ("1.5 µs", "time", 1.5e-6),
        ("1978.9 TFLOPS", "rate", 1978.9e12),
        ("2 PFLOP/s", "rate", 2e15),
        ("1e3 MHz", "frequency", 1e9),
        ("80 %", "ratio", 0.8),
        ("0.8", "ratio", 0.8),
        ("132 SM", "count", 132),
        ("22 bits", "bits", 22),
    ],
)
def test_units(text: str, dimension: str, value: float) -> None:
    assert units.parse(text, dimension) == pytest.approx(value, rel=1e-15)
    assert units.parse(units.show(value, dimension), dimension) == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize(
    ("text", "dimension", "words"),
    [
        ("3.35 TB", "bandwidth", "'TB' is a unit of bytes; expected bandwidth such as 3.35 TB/s"),
        ("3.35", "bandwidth", "has no unit"),
        ("fast", "rate", "not a number"),
        ("80 gigs", "bytes", "'gigs' is not a unit"),
        ("1e400 GB", "bytes", "not a finite number"),
        ("2.5 GPU", "count", "whole number"),
        ("nan GB", "bytes", "not a number"),
    ],
)
def test_wrong_units(text: str, dimension: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        units.parse(text, dimension)
    assert words in str(caught.value)


def test_unknown_target_gives_near_names() -> None:
    with pytest.raises(targets.UnknownTarget, match=r"h800-ep144.*\.yaml"):
        targets.load("h800-ep14")
    with pytest.raises(targets.UnknownTarget, match="no such file"):
        targets.load("./nowhere.yaml")


def test_show_and_list() -> None:
    run = CliRunner().invoke
    listed = run(app_with_targets(), ["targets", "list", "--json"])
    assert [row["name"] for row in json.loads(listed.stdout)["targets"]] == SHIPPED
    shown = json.loads(run(app_with_targets(), ["targets", "show", "h200", "--json"]).stdout)
    bandwidth = shown["values"]["device.memory.bandwidth"]
    assert (bandwidth["value"], bandwidth["unit"]) == (4.8e12, "B/s")
    assert "H200" in bandwidth["source"]
    assert "4.8 TB/s" in run(app_with_targets(), ["targets", "show", "h200"]).stdout


def app_with_targets() -> typer.Typer:
    fresh = typer.Typer(pretty_exceptions_enable=False)
    command.register(fresh)
    return fresh


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from moec import targets; [targets.load(n) for n in targets.names()]; "
        "print([m for m in ('numpy', 'scipy', 'sympy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("kind", "lent"), [("cpu", "cpu"), ("cuda", "h100"), ("rocm", "h100")])
def test_a_file_without_a_cost_model_is_costed_by_an_assumed_one(kind: str, lent: str, tmp_path: Path) -> None:
    """A first target file has no fitted numbers: it plans all the same, and says whose numbers it plans with."""
    text = (Path(__file__).parent / "bare.yaml").read_text().replace("kind: cuda", f"kind: {kind}")
    file = tmp_path / "bare.yaml"
    file.write_text(text)
    assert targets.check(file) == [] and targets.assumed_from(file) == lent
    target, shipped = targets.load(file), targets.load(lent)
    assert {path: p.value for path, p in target.calibration.items()} == {
        path: p.value for path, p in shipped.calibration.items()
    }
    assert all(p.source.startswith(f"assumed to be as on {lent}: ") for p in target.calibration.values())
    shown = CliRunner().invoke(app_with_targets(), ["targets", "check", str(file)])
    assert shown.stdout == f"{file}: ok (bare), its cost model is assumed to be as on {lent}\n"
    assert op_time({"op": "gemm", "m": 128, "n": 128, "k": 128, "dtype": "bf16"}, target).time_us > 0
    own = "calibration:\n  stream:\n    floor: {value: 9 us, kind: effective, source: ours}\n"
    file.write_text(text + own)
    assert targets.assumed_from(file) is None
    changed = targets.load(file).calibration
    assert changed["calibration.stream.floor"].value == pytest.approx(9e-6)
    assert changed["calibration.stream.memory"].source.startswith("assumed to be as on ")


def test_packages_can_add_targets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = importlib.import_module("moec.targets.load")
    file = tmp_path / "theirs.yaml"
    file.write_text("name: theirs\nextends: h20\n", encoding="utf-8")

    monkeypatch.setattr(load, "plugins", lambda group, taken: [("theirs", str(file))])
    load._files.cache_clear()
    try:
        assert "theirs" in targets.names()
        assert targets.load("theirs").device == targets.load("h20").device
    finally:
        load._files.cache_clear()
