"""`moec place` and its files: what it writes, what it reads back, and one line for every wrong input."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from moec.cli.place import register
from moec.errors import InputError
from moec.passes.placement import Problem, errors, formats, place

APP = typer.Typer()
register(APP)


def run(*args: str | int | Path) -> str:
    """Run the command; an error that the command line would print is raised."""
    result = CliRunner().invoke(APP, [str(arg) for arg in args], catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    path = tmp_path / "loads.npy"
    np.save(path, 1 / np.arange(1, 33)[None].repeat(2, axis=0) ** 0.7)
    return path


def test_json_and_file_agree_with_the_library(loads: Path, tmp_path: Path) -> None:
    out = tmp_path / "placement.json"
    printed = json.loads(
        run(loads, "--devices", 8, "--slots-per-device", 5, "--devices-per-node", 4, "--out", out, "--json")
    )
    placement = place(Problem.of(np.load(loads), devices=8, slots_per_device=5, devices_per_node=4)).placement
    assert printed["physical_to_logical_map"] == placement.physical_to_logical_map.tolist()
    assert json.loads(out.read_text())["replica_shares"] == printed["replica_shares"]
    assert printed["redundant"] == 8 and printed["nodes"] == 2
    assert printed["balance"]["worst"] >= printed["balance"]["mean"] >= 1
    assert len(printed["traffic"]["between_nodes"]) == 2


def test_a_target_gives_devices_and_nodes(loads: Path) -> None:
    printed = json.loads(run(loads, "--target", "h800-ep32", "--slots-per-device", 2, "--json"))
    assert (printed["devices"], printed["nodes"]) == (32, 4)
    fewer = json.loads(run(loads, "--target", "h800-ep32", "--ranks", 16, "--slots-per-device", 3, "--json"))
    assert (fewer["devices"], fewer["nodes"]) == (16, 2)


def test_slots_are_derived_when_left_out(loads: Path) -> None:
    assert json.loads(run(loads, "--devices", 6, "--json"))["slots_per_device"] == 6
    printed = json.loads(run(loads, "--devices", 6, "--redundant", 5, "--json"))
    assert (printed["slots_per_device"], printed["redundant"]) == (7, 10)


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize("shares", ["even", "free"])
def test_files_round_trip(loads: Path, tmp_path: Path, suffix: str, shares: str) -> None:
    out = tmp_path / f"placement{suffix}"
    printed = json.loads(
        run(loads, "--devices", 8, "--slots-per-device", 5, "--shares", shares, "--out", out, "--json")
    )
    read = formats.read_placement(out)
    assert read.physical_to_logical_map.tolist() == printed["physical_to_logical_map"]
    assert read.replica_shares == pytest.approx(np.array(printed["replica_shares"]))
    assert (read.experts, read.devices) == (32, 8)


def test_sglang_file_has_one_key_and_a_row_for_every_layer_of_the_model(loads: Path, tmp_path: Path) -> None:
    out = tmp_path / "sglang.json"
    run(loads, "--devices", 8, "--slots-per-device", 5, "--sglang", out, "--dense-layers", 3)
    content = json.loads(out.read_text())
    assert list(content) == ["physical_to_logical_map"]
    assert np.array(content["physical_to_logical_map"]).shape == (5, 40)
    read = formats.read_placement(out, devices=8, dense_layers=3)
    assert read.layers == 2 and read.has_even_shares
    shape = (loads, "--devices", 8, "--slots-per-device", 5, "--dense-layers", 3)
    assert json.loads(run(*shape, "--previous", out, "--json"))["moved_slots"] == 0


def test_a_name_that_sglang_takes_for_json_text_is_refused(loads: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.NotForSglang, match=r"map\.txt: SGLang takes .* only when its name ends in \.json"):
        run(loads, "--devices", 8, "--sglang", tmp_path / "map.txt", "--out", tmp_path / "p.json")
    assert not list(tmp_path.glob("*.txt")) and not (tmp_path / "p.json").exists()


def test_report_is_one_page_that_loads_nothing(loads: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    run(loads, "--devices", 8, "--slots-per-device", 5, "--devices-per-node", 2, "--groups", 8, "--report", page)
    text = page.read_text()
    assert "What redundancy buys" in text and "price of groups" in text and "data:image/png;base64," in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)


def test_table_names_price_traffic_and_movement(loads: Path, tmp_path: Path) -> None:
    first, pairs = tmp_path / "first.json", tmp_path / "pairs.npz"
    np.savez(pairs, coactivation=np.ones((2, 32, 32)))
    run(loads, "--devices", 8, "--slots-per-device", 5, "--devices-per-node", 2, "--out", first)
    shape = (loads, "--devices", 8, "--slots-per-device", 5, "--devices-per-node", 2)
    text = run(*shape, "--previous", first, "--coactivation", pairs)
    assert "were not there before" in text and "pairs served on one node" in text
    assert "price of binding groups" in run(*shape, "--groups", 8)


def test_loads_are_read_in_every_form(tmp_path: Path) -> None:
    table = [[1, 2, 3], [4, 5, 6]]
    (tmp_path / "a.json").write_text(json.dumps(table))
    (tmp_path / "b.json").write_text(json.dumps({"logical_count": table}))
    np.savez(tmp_path / "c.npz", np.array(table))
    np.savez(tmp_path / "d.npz", loads=np.array(table), coactivation=np.ones((2, 3, 3)))
    np.save(tmp_path / "e.npy", np.array(table))
    for path in tmp_path.iterdir():
        assert formats.read_loads(path).tolist() == table


GOOD = np.ones((2, 8))


def changed(value: float) -> np.ndarray:
    array = GOOD.copy()
    array[1, 3] = value
    return array


@pytest.mark.parametrize(
    "array, options, words",
    [
        (changed(-1.0), [], "negative entry -1 at [1, 3]"),
        (changed(np.nan), [], "NaN at [1, 3]"),
        (changed(np.inf), [], "infinity at [1, 3]"),
        (changed(1e308), [], "entry 1e+308 at [1, 3] is above 1e+300: scale the loads down"),
        (GOOD > 0, [], "expected numbers, got elements of type bool"),
        (GOOD + 1j, [], "expected numbers, got elements of type complex128"),
        (GOOD.astype("datetime64[s]"), [], "expected numbers, got elements of type datetime64[s]"),
        (np.float64(3), [], "got an array of shape []"),
        (np.ones((3, 0)), [], "got an array of shape [3, 0]"),
        (np.ones(8), [], "[layers, experts], got an array of shape [8]"),
        (np.ones((2, 2, 8)), [], "shape [2, 2, 8]"),
        (np.ones((0, 8)), [], "shape [0, 8]"),
        (np.full((2, 8), "x"), [], "expected numbers"),
        (np.ones((2, 20)), [], "20 experts do not fit into 16 slots (4 devices x 4): give at least 5"),
        (GOOD, ["--groups", "3"], "3 groups do not divide 8 experts"),
        (GOOD, ["--groups", "2", "--devices-per-node", "1"], "2 groups do not divide over 4 nodes"),
        (GOOD, ["--devices-per-node", "3"], "4 devices do not divide over nodes of 3"),
        (GOOD, ["--slots-per-device", "0"], "slots per device must be at least 1"),
        (GOOD, ["--devices", "0"], "at least 1, got 0"),
        (
            GOOD,
            ["--devices", "10000000"],
            "80000000 slots in all (2 layers on 10000000 devices) are more",
        ),
        (GOOD, ["--groups", "0"], "groups must be at least 1"),
        (GOOD, ["--devices-per-node", "-1"], "devices per node must be at least 1"),
        (GOOD, ["--shares", "fre"], "did you mean free?"),
        (GOOD, ["--slack", "nan"], "--slack must be"),
        (GOOD, ["--top-k", "0"], "--top-k must be"),
        (GOOD, ["--target", "h8000-ep32"], "h8000-ep32"),
        (GOOD, ["--previous", "missing.json"], "cannot read missing.json"),
        (GOOD, ["--coactivation", "missing.npy"], "cannot read missing.npy"),
        (GOOD, ["--groups", "4", "--devices-per-node", "2", "--exact", "1"], "does not take groups"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, array: np.ndarray, options: list[str], words: str) -> None:
    path = tmp_path / "loads.npy"
    np.save(path, array)
    defaults = ["--devices", "4", "--slots-per-device", "4"]
    with pytest.raises(InputError) as caught:
        run(path, *defaults, *options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.npy", b"nonsense", "cannot read"),
        ("a.npy", b"", "cannot read"),
        ("a.npz", b"PK\x03\x04 broken", "cannot read"),
        ("a.json", b"{", "not valid json"),
        ("a.json", b"3", "expected nested lists"),
        ("a.json", b"[[1, 2], [3]]", "[layers, experts]"),
        ("a.json", b'{"other": [[1]]}', "no loads or logical_count in it (it has other)"),
        ("a.json", b"\xff\xfe", "not valid json"),
        ("a.pt", b"", "expected a file named .npy, .npz or .json"),
        ("missing.npy", None, "No such file"),
    ],
)
def test_unreadable_loads_are_one_line(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        run(path, "--devices", "4", "--slots-per-device", "4")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"a": GOOD, "b": GOOD}, "no loads or logical_count in it (it has a, b)"),
        ({"loads": GOOD, "layers": [1, 2, 3]}, "expected [2], got an array of shape [3]"),
        ({"loads": GOOD, "layers": ["a", "b"]}, "expected numbers, got elements of type <U1"),
        ({"loads": GOOD, "layers": [1, 1.5]}, "layers are given by whole numbers, got 1.5 at [1]"),
        ({"loads": GOOD, "coactivation": -np.ones((2, 8, 8))}, "negative entry -1 at [0, 0, 0]"),
        ({"loads": GOOD, "coactivation": np.full((2, 8, 8), np.nan)}, "NaN at [0, 0, 0]"),
        ({"loads": GOOD, "coactivation": np.ones((2, 7, 7))}, "expected [2, 8, 8], got an array of shape [2, 7, 7]"),
    ],
)
def test_wrong_recordings_are_one_line(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "r.npz", **fields)
    with pytest.raises(InputError) as caught:
        run(tmp_path / "r.npz", "--devices", 4, "--slots-per-device", 4, "--devices-per-node", 2)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_an_array_that_claims_more_than_memory_is_one_line(tmp_path: Path, packed: bool) -> None:
    content = io.BytesIO()
    header: dict[str, Any] = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**8)}
    np.lib.format.write_array_header_1_0(content, header)  # type: ignore[no-untyped-call]
    path = tmp_path / ("a.npz" if packed else "a.npy")
    if packed:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("loads.npy", content.getvalue())
    else:
        path.write_bytes(content.getvalue())
    with pytest.raises(InputError, match="it says that it holds more than there is memory"):
        run(path, "--devices", "4")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("a.npy", "a.npz"):
        trap = np.empty((1, 1), object)
        trap[0, 0] = Trap()
        if name == "a.npy":
            np.save(tmp_path / name, trap, allow_pickle=True)
        else:
            np.savez(tmp_path / name, loads=trap)
        with pytest.raises(InputError, match="pickled objects, which are never loaded"):
            run(tmp_path / name, "--devices", "4")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"physical_to_logical_map": [[0, 1, 2, 3]]}, "layers"),
        ({"physical_to_logical_map": [[0, 1, 2, 2]] * 2, "experts": 4, "devices": 2}, "expert 3 stands in no slot"),
        ({"physical_to_logical_map": [[0, 1, 2, 9]] * 2, "experts": 4, "devices": 2}, "placement"),
        ({"physical_to_logical_map": [[0, 1, 2, 0.5]] * 2}, "whole numbers"),
        ({"physical_to_logical_map": [[0, 1, 2, 1e300]] * 2}, "whole numbers"),
        ({"physical_to_logical_map": [[0, 1, 2, 3]] * 2, "devices": 3}, "do not divide"),
        ({"physical_to_logical_map": [[0, 1, 2, 3]] * 2, "devices": 2, "experts": 2**80}, "do not fit 4 slots"),
        ({"physical_to_logical_map": [[0, 1, 2, 3]] * 2, "devices": 1.7}, "devices must be a whole number"),
        ({"physical_to_logical_map": [[0, 1, 2, 3]] * 2, "replica_shares": [[1, 1]]}, "differ in shape"),
        ({"physical_to_logical_map": [[0, 1, 2, 3]] * 2, "version": 9}, "version 9"),
        ({"physical_to_logical_map": "text"}, "expected"),
        ({"map": []}, "no physical_to_logical_map"),
    ],
)
def test_wrong_previous_placements_are_one_line(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    np.save(tmp_path / "loads.npy", np.ones((2, 4)))
    (tmp_path / "before.json").write_text(json.dumps(fields))
    with pytest.raises(InputError) as caught:
        run(tmp_path / "loads.npy", "--devices", 2, "--slots-per-device", 2, "--previous", tmp_path / "before.json")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_devices_must_be_known(loads: Path) -> None:
    with pytest.raises(InputError, match="give --target or --devices"):
        run(loads, "--slots-per-device", 4)


def test_an_output_that_cannot_be_written_fails_without_a_trace(loads: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder that can be written to"):
        run(loads, "--devices", 8, "--slots-per-device", 5, "--out", tmp_path / "no" / "placement.json")
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        run(loads, "--devices", 8, "--slots-per-device", 5, "--out", tmp_path / "taken.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loads.npy", "taken.json"]
