"""One wrong target file a mistake: the line, the field, and what would be right."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moec import targets

GOOD = """\
name: mine
kind: cuda
sources:
  sheet: the data sheet
device:
  model: A part
  arch: sm_90a
  cores: {value: 100 SM, source: sheet}
  clock: {value: 1.5 GHz, source: sheet}
  matrix:
    bf16: {value: 500 TFLOPS, source: sheet}
    fp8: {value: 1000 TFLOPS, source: sheet}
  vector:
    fp32: {value: 40 TFLOPS, source: sheet}
  memory:
    capacity: {value: 64 GB, source: sheet}
    bandwidth: {value: 2 TB/s, source: sheet}
  fp8:
    matrix: true
    formats: [e4m3, e5m2]
    scale_formats: [f32]
  launch: {value: 2 us, source: "measured: empty kernels in a graph"}
node:
  devices: {value: 8 GPU, source: sheet}
  scale_up:
    name: Link
    bandwidth: {value: 100 GB/s, source: sheet}
    latency: {value: 3 us, source: sheet}
calibration_from: h100
"""

# (what is replaced, by what, line, field, words of the message)
WRONG = {
    "bandwidth without per second": ("2 TB/s", "2 TB", 17, "device.memory.bandwidth", "'TB' is a unit of bytes"),
    "no unit": ("64 GB", "64", 16, "device.memory.capacity", "has no unit; expected bytes such as 80 GB"),
    "unknown unit": ("1.5 GHz", "1.5 Ghz", 9, "device.clock", "'Ghz' is not a unit"),
    "a word for a number": ("500 TFLOPS", "fast", 11, "device.matrix.bf16", "not a number with a unit"),
    "negative": ("64 GB", "-64 GB", 16, "device.memory.capacity", "not plausible"),
    "gigabytes for terabytes": ("2 TB/s", "0.2 GB/s", 17, "device.memory.bandwidth", "not plausible; expected 1 GB/s"),
    "not finite": ("64 GB", "1e999 GB", 16, "device.memory.capacity", "not a finite number"),
    "half a device": ("8 GPU", "7.5 GPU", 24, "node.devices", "whole number"),
    "no source": ("{value: 64 GB, source: sheet}", "{value: 64 GB}", 16, "device.memory.capacity", "no `source:`"),
    "empty source": (
        "{value: 64 GB, source: sheet}",
        "{value: 64 GB, source: ''}",
        16,
        "device.memory.capacity.source",
        "not empty",
    ),
    "no value": ("{value: 64 GB, source: sheet}", "{source: sheet}", 16, "device.memory.capacity", "no `value:`"),
    "bare number": (
        "{value: 64 GB, source: sheet}",
        "64 GB",
        16,
        "device.memory.capacity",
        "must be {value: 80 GB, source:",
    ),
    "list for a number": ("value: 64 GB", "value: [64 GB]", 16, "device.memory.capacity", "must be one value"),
    "misspelt field": (
        "bandwidth: {value: 2 TB/s",
        "bandwith: {value: 2 TB/s",
        17,
        "device.memory.bandwith",
        "did you mean bandwidth?",
    ),
    "misspelt section": ("  memory:", "  memroy:", 15, "device.memroy", "did you mean memory?"),
    "misspelt source": (
        "{value: 64 GB, source:",
        "{value: 64 GB, sorce:",
        16,
        "device.memory.capacity.sorce",
        "did you mean source?",
    ),
    "unknown top field": ("calibration_from: h100", "colour: green", 29, "colour", "unknown field"),
    "given twice": ("  launch:", "  clock:", 22, "device.clock", "given twice (first at line 9)"),
    "section as text": (
        "  vector:\n    fp32: {value: 40 TFLOPS, source: sheet}",
        "  vector: wide",
        13,
        "device.vector",
        "mapping with some of: fp32",
    ),
    "kind": ("kind: cuda", "kind: tpu", 2, "kind", "not one of cpu, cuda, rocm"),
    "flag": ("matrix: true", "matrix: perhaps", 19, "device.fp8.matrix", "true or false"),
    "scale format": ("[f32]", "[f32, e8]", 21, "device.fp8.scale_formats", "'e8' is not one of f32, ue8m0"),
    "text for a list": ("[f32]", "f32", 21, "device.fp8.scale_formats", "must be a list"),
    "fp8 rate without units": ("matrix: true", "matrix: false", 12, "device.matrix.fp8", "device.fp8.matrix is false"),
    "fp8 units without rate": (
        "    fp8: {value: 1000 TFLOPS, source: sheet}\n",
        "",
        18,
        "device.fp8.matrix",
        "device.matrix.fp8 is missing",
    ),
    "missing field": (
        '  launch: {value: 2 us, source: "measured: empty kernels in a graph"}\n',
        "",
        1,
        "device.launch",
        "is missing",
    ),
    "missing name": ("name: mine\n", "", 1, "name", "is missing"),
    "link without latency": (
        "    latency: {value: 3 us, source: sheet}\n",
        "",
        27,
        "node.scale_up.latency",
        "is missing",
    ),
    "unknown parent": ("calibration_from: h100", "extends: h1000", 29, "extends", "did you mean h100"),
    "parent of calibration": (
        "calibration_from: h100",
        "calibration_from: h999",
        29,
        "calibration_from",
        "no target or file",
    ),
    "too many ranks": (
        "calibration_from: h100",
        "cluster:\n  ranks: {value: 16 GPU, source: plan}",
        30,
        "cluster.ranks",
        "node.scale_out is missing",
    ),
    "ranks that fill no node": (
        "calibration_from: h100",
        "cluster:\n  ranks: {value: 12 GPU, source: plan}\nextends: h100",
        30,
        "cluster.ranks",
        "do not fill nodes of 8",
    ),
    "topology": (
        "calibration_from: h100",
        "cluster:\n  topology:\n    kind: ring",
        31,
        "cluster.topology.kind",
        "not one of fat-tree-2",
    ),
    "parameter without kind": (
        "calibration_from: h100",
        "calibration:\n  stream:\n    memory: {value: 0.8, source: me}",
        31,
        "calibration.stream.memory.kind",
        "physical or effective",
    ),
    "parameter out of range": (
        "calibration_from: h100",
        "calibration:\n  stream:\n    memory: {value: 80, source: me, kind: effective}",
        31,
        "calibration.stream.memory",
        "not plausible; expected 0.05 to 1",
    ),
    "tab": ("  model: A part", "\tmodel: A part", 6, "file", "not valid YAML"),
    "not closed": ("{value: 64 GB, source: sheet}", "{value: 64 GB, source: sheet", 17, "file", "not valid YAML"),
    "a python object": (
        "model: A part",
        "model: !!python/object/apply:os.getcwd []",
        6,
        "device.model",
        "must be one value",
    ),
}


def test_the_file_that_the_others_vary_is_right(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD, encoding="utf-8")
    assert targets.check(str(file)) == []
    target = targets.load(file)
    assert target.node.devices == 8
    assert target.sources["device.cores"] == "the data sheet"
    assert target.calibration["calibration.stream.memory"].source.startswith("assumed to be as on h100: ")


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file(case: str, tmp_path: Path) -> None:
    old, new, line, field, words = WRONG[case]
    assert GOOD.count(old) == 1, "the replaced text stands once in the good file"
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace(old, new), encoding="utf-8")
    found = [p for p in targets.check(str(file)) if p.field == field]
    assert [(p.line, words in p.message) for p in found] == [(line, True)], targets.check(str(file))
    with pytest.raises(targets.TargetFileError, match=r"mine\.yaml:"):
        targets.load(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must be a mapping"),
        (b"- a\n- b\n", "must be a mapping"),
        (b"name: \xff\xfe\n", "not UTF-8"),
        (b"#" * (1 << 21), "at most 1048576"),
        (b"a: &a [*a]\n", "unknown field"),
        (b"[" * 5000, "not valid YAML"),
        (b"name: x\n---\nname: y\n", "not valid YAML"),
        (b"? [1, 2]\n: 3\n", "a key that is not text"),
        (b"device: null\nname: x\n", "must be a mapping with some of"),
    ],
)
def test_odd_files(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    assert any(words in problem.message for problem in targets.check(str(file)))


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace("64 GB", "64").replace("kind: cuda", "kind: tpu"), encoding="utf-8")
    assert [problem.line for problem in targets.check(str(file))] == [2, 16]
    with pytest.raises(targets.TargetFileError, match="and 1 more"):
        targets.load(file)


def test_extends_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nextends: b.yaml\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("name: b\n\nextends: a.yaml\n", encoding="utf-8")
    [problem] = [p for p in targets.check(str(tmp_path / "a.yaml")) if p.field == "extends"]
    assert (Path(problem.file).name, problem.line) == ("b.yaml", 3)
    assert "circle" in problem.message


def test_extends_itself(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: a\nextends: a.yaml\n", encoding="utf-8")
    assert "circle" in targets.check(str(file))[0].message


def test_a_wrong_parent_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD.replace("64 GB", "64"), encoding="utf-8")
    child = tmp_path / "child.yaml"
    child.write_text("name: child\nextends: mine.yaml\n", encoding="utf-8")
    [problem] = targets.check(str(child))
    assert Path(problem.file).name == "mine.yaml"
    assert problem.line == 16


def test_a_child_changes_one_number(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(
        "name: child\nextends: h100\ndevice:\n  memory:\n    bandwidth: {value: 4 TB/s, source: a plan}\n",
        encoding="utf-8",
    )
    target, h100 = targets.load(child), targets.load("h100")
    assert target.device.memory_bandwidth == 4e12
    assert target.sources["device.memory.bandwidth"] == "a plan"
    assert target.device.matrix_rates == h100.device.matrix_rates


def mangled(rng: random.Random) -> str:
    """The good file after a few random edits of characters and lines."""
    text = GOOD
    for _ in range(rng.randint(1, 4)):
        lines, at = text.split("\n"), rng.randrange(len(text) + 1)
        line = rng.randrange(len(lines))
        edit = rng.randrange(4)
        if edit == 0:
            text = (
                text[:at]
                + rng.choice(["{", "]", ": ", "- ", "&a ", "*a", "!!int ", "\t", "\x00", "%", "---\n"])
                + text[at:]
            )
        elif edit == 1:
            text = text[:at] + text[at + rng.randint(1, 30) :]
        elif edit == 2:
            text = "\n".join([*lines[:line], lines[rng.randrange(len(lines))], *lines[line:]])
        else:
            text = "\n".join([*lines[:line], " " * rng.randint(0, 5) + lines[line].lstrip(), *lines[line + 1 :]])
    return text


@pytest.mark.parametrize("seed", range(60))
def test_mangled_files_are_right_or_have_problems(seed: int, tmp_path: Path) -> None:
    file = tmp_path / "mangled.yaml"
    file.write_text(mangled(random.Random(seed)), encoding="utf-8")
    problems = targets.check(str(file))
    assert all(problem.line >= 1 and "\n" not in str(problem) for problem in problems)
    if problems:
        with pytest.raises(targets.TargetFileError):
            targets.load(file)
    else:
        assert targets.load(file).device.memory_bytes > 0
