"""Weights by memory map, against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moec.runtime.errors import WrongWeights
from moec.runtime.plan import Argument
from moec.runtime.weights import Weights

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "c": torch.randn(16, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def argument(name: str, dtype: str, *shape: int) -> Argument:
    return Argument(name, "weight", np.dtype(dtype), shape)


def test_views_have_the_bytes_that_the_library_wrote(file: Path) -> None:
    weights = Weights(file)
    assert len(weights) == 3
    assert weights.nbytes == sum(t.nbytes for t in TENSORS.values())
    np.testing.assert_array_equal(weights.view(argument("a", "float32", 3, 4)), TENSORS["a"].numpy())
    bf16 = weights.view(argument("b", "uint16", 5, 7))
    np.testing.assert_array_equal(bf16, TENSORS["b"].view(torch.uint16).numpy())
    fp8 = weights.view(argument("c", "uint8", 4, 4))
    np.testing.assert_array_equal(fp8.ravel(), TENSORS["c"].view(torch.uint8).numpy())


def test_views_share_one_mapping(file: Path) -> None:
    weights = Weights(file)
    assert np.shares_memory(weights.view(argument("a", "float32", 3, 4)), weights.view(argument("a", "uint8", 48)))


def test_a_view_keeps_the_mapping(file: Path) -> None:
    view = Weights(file).view(argument("a", "float32", 3, 4))
    np.testing.assert_array_equal(view, TENSORS["a"].numpy())


@pytest.mark.parametrize(
    ("arg", "names"),
    [
        (argument("z", "float32", 1), "z is missing"),
        (argument("a", "float32", 3, 5), "48 bytes, float32[3, 5] takes 60"),
    ],
)
def test_tensors_that_do_not_fit_the_plan(file: Path, arg: Argument, names: str) -> None:
    with pytest.raises(WrongWeights, match=names.replace("[", r"\[")):
        Weights(file).view(arg)


def test_every_truncation_is_found(file: Path) -> None:
    raw = file.read_bytes()
    for size in [*range(0, len(raw) - 1, 7), len(raw) - 1]:
        file.write_bytes(raw[:size])
        with pytest.raises(WrongWeights):
            Weights(file)


def test_spoiled_headers_never_give_memory_outside_the_file(file: Path) -> None:
    raw = file.read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(300):
        spoiled = bytearray(raw)
        spoiled[rng.integers(header)] = rng.integers(256)
        file.write_bytes(spoiled)
        try:
            weights = Weights(file)
            view = weights.view(argument("a", "float32", 3, 4))
        except WrongWeights:
            continue
        assert view.shape == (3, 4)
        assert int(view.view(np.uint8).sum()) >= 0  # reads every byte


def test_a_header_of_another_kind(tmp_path: Path) -> None:
    contents: list[Any] = [[], {"a": 1}, {"a": {"data_offsets": [0]}}, {"a": {"data_offsets": ["x", 4]}}, {"a": {}}]
    for content in contents:
        header = json.dumps(content).encode()
        file = tmp_path / "h.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
        with pytest.raises(WrongWeights):
            Weights(file)
