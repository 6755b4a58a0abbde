"""How ranks meet and what they tell each other; nothing here starts a process."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moec.errors import InputError
from moec.runtime.distributed import message
from moec.runtime.distributed.errors import CannotJoin, NoBackend
from moec.runtime.distributed.world import backend, join
from moec.runtime.launch import launched


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


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK is 'a', not a whole number from 0 to 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2', not a whole number from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', not a whole number from 1 on"),
    ],
)
def test_variables_that_torchrun_did_not_set(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        launched()


def test_a_rank_that_cannot_reach_the_others_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interface that one machine does not have is no wait for ranks that are late."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(CannotJoin, match=r"rank 1 cannot join the others: .*MASTER_PORT") as caught:
        join(30.0)
    assert not caught.value.found_by_all
