"""Any wrong value anywhere in manifest.json or plan.json is one line of an error of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moec.errors import InputError
from moec.runtime.cuda.program import parse_gpu_plan
from moec.runtime.manifest import checksum, parse_manifest
from moec.runtime.plan import parse_plan

VIEW = {"buffer": "workspace", "offset": 0, "dtype": "float32", "shape": ["T", 8], "ld": 8}
EXCHANGE = {"collective": "all_reduce", "axis": "tp", "attrs": {"axis": "tp"}, "where": "model.py:1"}
RANKS = {
    "steps": [{"first": 0, "last": 1, "steps": [{"segment": "f", "args": ["x"]}]},
              {**EXCHANGE, "inputs": [VIEW], "outputs": [VIEW]}],
    "turns": [["run", 0, 0, 0], ["start", 1, -1, 1]],
    "parts": 2,
}  # fmt: skip
WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    2**80,
    "",
    "O",
    "1/0",
    "x" * 3000,
    [],
    [[]],
    [None],
    ["x"],
    [-1],
    {},
    {"a": 1},
]


def spoiled(value: Any) -> Iterator[Any]:
    """Copies of JSON data, each with one place missing or replaced by something wrong."""
    yield from WRONG
    if not isinstance(value, dict | list):
        return
    for key in value if isinstance(value, dict) else range(len(value)):
        for inner in spoiled(value[key]):
            copy = value.copy()
            copy[key] = inner
            yield copy
        copy = value.copy()
        del copy[key]
        yield copy


def few_arguments(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with one argument of each kind: what is wrong with others is found in the same way."""
    by_kind = {arg["kind"]: arg for arg in entry["args"]}
    return {**entry, "args": list(by_kind.values())}


def accepted(read: Callable[[bytes], object], data: Any) -> bool:
    try:
        read(json.dumps(data).encode())
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 4000
        return False
    return True


def test_plans(toy: Path) -> None:
    manifest = parse_manifest((toy / "manifest.json").read_bytes(), "toy")
    plan = json.loads((toy / "plan.json").read_text())
    plan["entries"]["prefill"] = few_arguments(plan["entries"]["prefill"])
    plan["entries"]["decode"] = few_arguments(plan["entries"]["decode"]) | RANKS
    plan |= {"mesh": {"pp": 1, "dp": 2, "tp": 1, "ep": 2}, "placement": [[0, 1]], "replica_shares": [[1.0, 0.5]]}

    def read(raw: bytes) -> object:
        return parse_plan(raw, "plan.json", manifest)

    assert accepted(read, plan)
    results = [accepted(read, wrong) for wrong in spoiled(plan)]
    assert len(results) > 1000 and sum(results) < len(results) / 3


LAUNCH = {
    "kernel": "k",
    "grid": ["ceildiv(T, 64)", 2],
    "arguments": {"M": "T", "x": {"base": "arena", "offset": 0, "shape": ["T", 8], "strides": [8, 1]}},
}
DEVICE_VIEW = {"at": {"base": "arena", "offset": 0}, "dtype": "bf16", "shape": ["T", "8"], "ld": 8}
PROGRAM = {
    "max_tokens": 64,
    "max_rows": 64,
    "max_sequences": 64,
    "parts": 2,
    "steps": [
        {"repeat": [0, 1], "function": "f", "steps": [LAUNCH]},
        {**EXCHANGE, "inputs": [DEVICE_VIEW], "outputs": [DEVICE_VIEW]},
        {"fill": {"base": "arena", "offset": 0}, "bytes": "T * 4"},
    ],
}


def test_gpu_plans(toy: Path) -> None:
    manifest = parse_manifest((toy / "manifest.json").read_bytes(), "toy")
    cache = {"dtype": "bf16", "shape": [1, 64, 64, 8], "row_bytes": 16}
    plan = {"arena_bytes": 4096, "page_size": 64, "cache": cache, "draw": LAUNCH, "programs": {"decode": PROGRAM}}

    def read(raw: bytes) -> object:
        return parse_gpu_plan(raw, "plan.json", manifest)

    assert accepted(read, plan)
    results = [accepted(read, wrong) for wrong in spoiled(plan)]
    assert len(results) > 1000 and sum(results) < len(results) / 2


@pytest.mark.parametrize("draft", [False, True])
def test_manifests(toy: Path, draft: bool) -> None:
    manifest = json.loads((toy / "manifest.json").read_text())
    manifest["limits"] |= {"drafts": 1} if draft else {}

    def read(raw: bytes) -> object:
        data = json.loads(raw)
        sealed = data | {"checksum": checksum(data)} if isinstance(data, dict) else data
        return parse_manifest(json.dumps(sealed).encode(), "toy")

    assert accepted(read, manifest)
    results = [accepted(read, wrong) for wrong in spoiled(manifest)]
    assert len(results) > 300 and sum(results) < len(results) / 3
