"""How ranks meet and what they tell each other; nothing here starts a process."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moec.runtime.distributed import message
from moec.runtime.distributed.errors import NoBackend
from moec.runtime.distributed.world import backend


def test_the_backend_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend("cpu", "m.moec") == "gloo"
    assert backend("cuda", "m.moec") == "cpu:gloo,cuda:nccl"


@pytest.mark.parametrize(("built", "words"), [(False, "built without it"), (True, "no GPU is visible")])
def test_nccl_that_cannot_work_is_one_line(built: bool, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        NoBackend, match=f"m.moec is for cuda devices, whose ranks exchange tensors over NCCL: .*{words}"
    ):
        backend("cuda", "m.moec")


@pytest.mark.parametrize(
    "value", [None, 1.5, "Grüße", [], [1, [True, None]], {"array": 1, "dict": {}}, {"a": [{"b": 2**60}]}, float("inf")]
)
def test_what_ranks_tell_each_other_arrives(value: Any) -> None:
    assert message.unpack(message.pack(value)) == value


def test_arrays_arrive_in_their_places() -> None:
    first, second = np.arange(6.0, dtype=np.float32).reshape(2, 3), np.zeros((0, 4), dtype=np.int64)
    told = message.unpack(message.pack(("x", {"b": [second, first.T]}, first, np.float64(2.5))))
    assert (told[0], told[3]) == ("x", 2.5)
    arrays: list[NDArray[Any]] = [second, first.T, first]
    for found, wanted in zip([*told[1]["b"], told[2]], arrays, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_nothing_that_ranks_tell_is_run() -> None:
    with pytest.raises(TypeError):
        message.pack(object())
    with pytest.raises(ValueError, match="allow_pickle"):
        message.pack([np.array([object()])])
    with pytest.raises(ValueError):
        message.unpack(pickle.dumps({"a": 1}))
