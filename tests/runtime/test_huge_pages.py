"""Moving mapped weights into huge pages: the same bytes at the same addresses, before, while and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moec.runtime import huge_pages
from moec.runtime.plan import Argument
from moec.runtime.weights import Weights

SIZE = (9 << 20) + 12344


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huge_pages, "_LEAST", 0)
    monkeypatch.setattr(huge_pages, "_PIECE", huge_pages.HUGE)
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.randint(0, 256, (SIZE,), dtype=torch.uint8)}, path)
    if not huge_pages.possible(SIZE):
        pytest.skip("no huge pages on request here")
    return path


def test_views_keep_their_bytes_and_addresses(file: Path) -> None:
    argument = Argument("a", "weight", np.dtype(np.uint8), (SIZE,))
    mapped = Weights(file)
    plain = mapped.view(argument).copy()
    weights = Weights(file, huge_pages=True)
    view = weights.view(argument)
    address = view.ctypes.data
    for _ in range(20):
        assert np.array_equal(view, plain)  # while pieces move
    weights.settle()
    assert weights._moving is not None and weights._moving.moved > SIZE - huge_pages.HUGE
    assert view.ctypes.data == address and np.array_equal(view, plain)


def test_a_file_that_takes_the_name_meanwhile_is_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argument = Argument("a", "weight", np.dtype(np.uint8), (SIZE,))
    before = Weights(file).view(argument).copy()
    start = huge_pages.HugePages.__init__

    def after_another_took_the_name(self: huge_pages.HugePages, *given: Any) -> None:
        save_file({"a": torch.zeros(SIZE, dtype=torch.uint8)}, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
        start(self, *given)

    monkeypatch.setattr(huge_pages.HugePages, "__init__", after_another_took_the_name)
    weights = Weights(file, huge_pages=True)
    weights.settle()
    assert weights._moving is not None and weights._moving.moved
    assert np.array_equal(weights.view(argument), before)


def test_an_early_end_stops_the_thread(file: Path) -> None:
    weights = Weights(file, huge_pages=True)
    moving = weights._moving
    assert moving is not None
    del weights
    assert not moving._thread.is_alive()


def test_small_files_stay_mapped(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    weights = Weights(path, huge_pages=True)
    assert weights._moving is None
    weights.settle()
