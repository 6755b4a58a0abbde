"""Ranks as threads: what they tell each other, and that none of them waits for ever or ends without a word."""

from __future__ import annotations

import pytest

from moec.ir import spmd
from moec.ir.mesh import Mesh
from moec.ir.spmd import Peers, run_ranks


def test_every_rank_gets_the_values_of_its_group_in_order() -> None:
    def body(rank: int, peers: Peers) -> list[list[int]]:
        return [peers.group(axis).exchange(10 * rank + turn) for turn, axis in enumerate(("dp", "tp", "dp"))]

    found = run_ranks(Mesh(dp=2, tp=2), body)
    assert found[0] == [[0, 20], [1, 11], [2, 22]]
    assert found[3] == [[10, 30], [21, 31], [12, 32]]


def test_a_value_is_handed_on() -> None:
    def body(rank: int, peers: Peers) -> object:
        group = peers.group("pp")
        if rank == 0:
            group.send(1, "x")
            return None
        return group.receive(0)

    assert run_ranks(Mesh(pp=2), body) == [None, "x"]


@pytest.mark.parametrize("kind", ["exchange", "receive"])
def test_a_rank_that_nobody_meets_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spmd, "PATIENCE", 0.1)

    def body(rank: int, peers: Peers) -> None:
        if rank == 0:
            group = peers.group("dp")
            group.exchange(1) if kind == "exchange" else group.receive(1)

    with pytest.raises(ValueError, match=r"not all 2 ranks of the axis came|nothing came from place 1"):
        run_ranks(Mesh(dp=2), body)


def test_the_error_of_one_rank_ends_all() -> None:
    def body(rank: int, peers: Peers) -> None:
        if rank == 1:
            raise KeyError("mine")
        peers.group("dp").exchange(rank)

    with pytest.raises(KeyError, match="mine"):
        run_ranks(Mesh(dp=3), body)
