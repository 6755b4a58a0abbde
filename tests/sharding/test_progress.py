"""Who holds whom up, from what ranks tell of themselves: chains, circles and exchanges that all have taken part in."""

from __future__ import annotations

from moec.runtime.distributed.progress import Progress, Standing, Waiting, awaited


def rank(started: dict[str, int], axis: str = "", number: int = 0, ranks: tuple[int, ...] = ()) -> Standing:
    """A rank that waits in an exchange, or (without an axis) does something else."""
    return Standing(1, "somewhere", started, (Waiting(axis, number, ranks),) if axis else ())


def test_the_rank_that_has_not_sent_is_awaited() -> None:
    both = (0, 1, 2)
    ranks = {0: rank({"ep": 5}, "ep", 5, both), 1: rank({"ep": 4}), 2: rank({"ep": 5}, "ep", 5, both)}
    assert awaited(0, ranks) == awaited(2, ranks) == [1]


def test_chains_lead_to_their_end() -> None:
    """0 waits for 1 along ep, 1 for 3 along tp, 3 computes; 2 is not concerned."""
    ranks = {
        0: rank({"ep": 7}, "ep", 7, (0, 1)), 1: rank({"ep": 6, "tp": 3}, "tp", 3, (1, 3)),
        2: rank({"ep": 1}), 3: rank({"tp": 2}),
    }  # fmt: skip
    assert awaited(0, ranks) == [3]


def test_a_rank_whose_data_is_there_but_that_does_not_go_on_is_awaited() -> None:
    """Rank 1 still stands in exchange 4 although everybody sent; rank 0 is one further."""
    ranks = {0: rank({"ep": 5}, "ep", 5, (0, 1)), 1: rank({"ep": 4}, "ep", 4, (0, 1))}
    assert awaited(0, ranks) == [1]
    assert awaited(1, ranks) == []


def test_pipeline_neighbours_wait_for_one_message() -> None:
    ranks = {1: rank({"pp 0>1": 3}, "pp 0>1", 3, (0,)), 0: rank({"pp 0>1": 2})}
    assert awaited(1, ranks) == [0]


def test_a_rank_that_waits_along_all_axes_finds_the_one_behind() -> None:
    """As at the end of a step on a GPU: everything was given to the device, the host waits for it."""
    end = Standing(1, "at the end", {"ep": 9, "tp": 5}, (Waiting("ep", 9, (0, 1)), Waiting("tp", 5, (0, 2))))
    assert awaited(0, {0: end, 1: rank({"ep": 9}), 2: rank({"ep": 3, "tp": 4})}) == [2]


def test_nobody_is_named_when_all_have_sent_or_wait_in_a_circle() -> None:
    sent = {r: rank({"ep": 4}, "ep", 4, (0, 1)) for r in (0, 1)}
    assert awaited(0, sent) == []
    circle = {0: rank({"a": 1, "b": 0}, "a", 1, (0, 1)), 1: rank({"a": 0, "b": 1}, "b", 1, (0, 1))}
    assert awaited(0, circle) == []


def test_a_standing_round_trips_and_follows_the_progress() -> None:
    progress = Progress()
    number = progress.start("ep")
    with progress.wait(Waiting("ep", number, (0, 2)), Waiting("tp", 0, (0, 1))):
        inside = Standing(3, "in layer 1 (dispatch)", dict(progress.started), progress.waiting)
    assert Standing.parse(inside.text()) == inside and inside.waiting[0] == Waiting("ep", 1, (0, 2))
    assert progress.waiting == () and Standing.parse(Standing().text()) == Standing()
