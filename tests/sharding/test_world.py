"""How ranks meet: the backend follows the kind of device; nothing here starts a process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

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
