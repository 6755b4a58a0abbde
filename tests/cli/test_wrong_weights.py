"""Checkpoints that are missing, damaged or of another model: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_checkpoint import LAYER, OPTIONS, SHAPES, tensors

from moec.errors import InputError
from moec.frontend.checkpoint import open_checkpoint
from moec.frontend.safetensors_header import read_header

Refused = Callable[..., str]


@pytest.fixture
def compile_refused(refused: Refused, copy: Path, tmp_path: Path) -> Callable[..., str]:
    return lambda *args: refused("compile", copy, *OPTIONS, "--out", tmp_path / "x.moec", *args)


def shard(folder: Path) -> Path:
    return folder / "model.safetensors"


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, shard(folder))


def header(path: Path, value: Any, data: int = 64) -> None:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))


def test_headers_are_read_as_the_library_writes_them(copy: Path) -> None:
    entries = read_header(shard(copy))
    assert {name: entry.shape for name, entry in entries.items()} == SHAPES
    loaded = open_checkpoint(copy)
    for name, tensor in tensors().items():
        assert torch.equal(loaded.load(name, tuple(tensor.shape), "bf16"), tensor)


def test_no_weights_at_all(compile_refused: Refused, refused: Refused, copy: Path, tmp_path: Path) -> None:
    shard(copy).unlink()
    assert "holds no .safetensors file" in compile_refused()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "convert them to safetensors" in compile_refused()
    assert "no such folder" in compile_refused("--weights", tmp_path / "nope")
    assert "is a file" in compile_refused("--weights", copy / "config.json")
    assert "--random-weights SEED or --no-weights" in refused("compile", "deepseek-v2-lite", "--out", tmp_path / "x")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_shard(compile_refused: Refused, copy: Path, keep: int) -> None:
    shard(copy).write_bytes(shard(copy).read_bytes()[:keep])
    assert "model.safetensors: is truncated" in compile_refused()


def test_an_index(compile_refused: Refused, moec: Any, copy: Path, tmp_path: Path) -> None:
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "model-00001-of-00002.safetensors")}))
    assert "model-00001-of-00002.safetensors: is named by the index but missing" in compile_refused()
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "outside the folder" in compile_refused()
    for text in ("{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": [1]}}', '{"weight_map": 3}'):
        index.write_text(text)
        assert "is not an index" in compile_refused()
    index.write_text('{"weight_map": {}}')
    assert "holds no .safetensors file" in compile_refused()


def test_a_tensor_in_two_files(compile_refused: Refused, copy: Path) -> None:
    name = LAYER + "mlp.up_proj.weight"
    old = copy / "old.safetensors"
    save_file({name: torch.zeros(SHAPES[name])}, old)
    line = compile_refused()
    assert f"old.safetensors: holds tensor {name}, as model.safetensors does" in line
    for file in (shard(copy), old):
        named = dict.fromkeys(SHAPES, shard(copy).name) | {name: file.name, "unused": old.name}
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
        assert open_checkpoint(copy).tensors[name].file == file


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (b"\xff\xfe{", "no readable safetensors header"),
        (b"[" * 100000, "no readable safetensors header"),
        ([1, 2], "no readable safetensors header"),
        ({"a": 1}, "tensor a: has no dtype, shape and data_offsets"),
        ({"a": GOOD | {"dtype": 5}}, "tensor a: has no dtype"),
        ({"a": GOOD | {"data_offsets": [0]}}, "tensor a: has no dtype"),
        ({"a": GOOD | {"data_offsets": [8, 0]}}, "tensor a: has a wrong shape or wrong offsets"),
        ({"a": GOOD | {"data_offsets": [-8, 0]}}, "tensor a: has a wrong shape or wrong offsets"),
        ({"a": GOOD | {"shape": [-2]}}, "tensor a: has a wrong shape or wrong offsets"),
        ({"a": GOOD | {"shape": [1.5]}}, "tensor a: has a wrong shape or wrong offsets"),
        ({"a": GOOD | {"shape": [3]}}, "[3] of F32 takes 12 bytes, the header gives 8"),
        ({"a": GOOD, "b\n": GOOD | {"data_offsets": [4, 12]}}, "tensor b\\n: overlaps a"),
        ({"a": {"dtype": "U8", "shape": [9999], "data_offsets": [0, 9999]}}, "is truncated"),
    ],
)
def test_damaged_headers(compile_refused: Refused, copy: Path, value: Any, names: str) -> None:
    header(shard(copy), value)
    assert names in compile_refused()


def test_a_huge_header_is_not_read(compile_refused: Refused, copy: Path) -> None:
    shard(copy).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    assert "is truncated" in compile_refused()
    with shard(copy).open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)
    with pytest.raises(InputError, match="the format allows"):
        open_checkpoint(copy)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_flipped_bytes_of_a_header_never_give_a_traceback(model_folder: Path, tmp_path_factory: Any, data: Any) -> None:
    raw = bytearray(shard(model_folder).read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    path.write_bytes(raw)
    try:
        read_header(path)
    except InputError as error:
        assert "\n" not in str(error)


def test_a_missing_tensor(compile_refused: Refused, copy: Path) -> None:
    name = LAYER + "mlp.up_proj.weight"
    rewrite(copy, {n: t for n, t in tensors().items() if n != name})
    line = compile_refused()
    assert f"tensor {name} is missing" in line and "did you mean" in line


def test_a_tensor_of_another_shape(compile_refused: Refused, copy: Path) -> None:
    name = LAYER + "mlp.up_proj.weight"
    rewrite(copy, tensors() | {name: torch.zeros(23, 16, dtype=torch.bfloat16)})
    line = compile_refused()
    assert name in line and "has shape [23, 16], the configuration asks for [24, 16]" in line


def test_element_types(compile_refused: Refused, copy: Path) -> None:
    name = LAYER + "mlp.up_proj.weight"
    rewrite(copy, tensors() | {name: torch.zeros(24, 16).to(torch.float8_e4m3fn)})
    line = compile_refused()
    assert name in line and "is FP8 without scales: want weight_scale_inv beside it" in line
    rewrite(copy, tensors() | {name: torch.zeros(24, 16, dtype=torch.int32)})
    assert "has element type i32" in compile_refused()
    rewrite(copy, tensors() | {name: torch.zeros(24, 16, dtype=torch.bool)})
    assert "has element type BOOL" in compile_refused()
