"""The event simulation: streams, dependencies, fair sharing, meetings, stragglers, replayed plans."""

from __future__ import annotations

import math
import statistics

import pytest

from moec.passes.scheduling import Mode, Schedule, Task, TaskGraph
from moec.simulate.events import Activity, BadActivity, Deadlock, fair_rates, on_devices, simulate, with_stragglers
from moec.simulate.replay import plan_activities, scattered


def ends(activities: list[Activity], capacities: dict[str, float] | None = None) -> dict[str, float]:
    return {span.name: span.start_us + span.us for span in simulate(activities, capacities)}


def test_streams_run_in_order_and_wait_for_others() -> None:
    found = ends(
        [
            Activity("a", 5, "compute"),
            Activity("b", 3, "compute"),
            Activity("send", 4, "link", after=("a",)),
            Activity("c", 1, "compute", after=("send",)),
        ]
    )
    assert found == {"a": 5, "b": 8, "send": 9, "c": 10}


def test_transfers_share_a_link() -> None:
    """Two flows of 10 us on one link: half the rate each until the shorter one ends."""
    flows = [Activity("long", 10, demand={"nic": 1}), Activity("short", 5, demand={"nic": 1})]
    assert ends(flows, {"nic": 1}) == pytest.approx({"short": 10, "long": 15})
    assert ends(flows) == {"short": 5, "long": 10}


def test_rates_are_max_min_fair() -> None:
    """The textbook case: the flow over both links is held by the fuller one, the others take what is left."""
    rates = fair_rates([{"x": 1, "y": 1}, {"x": 1}, {"x": 1}, {"y": 1}], {"x": 1, "y": 1})
    assert rates == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3])


def test_a_collective_waits_for_the_slowest_device() -> None:
    program = on_devices([Activity("compute", 10, "s"), Activity("all-to-all", 4, "s")], 3, ["all-to-all"])
    slow = [a if a.name != "device 1/compute" else Activity(a.name, 13, a.stream, device=a.device) for a in program]
    found = ends(slow)
    assert [found[f"device {k}/all-to-all"] for k in range(3)] == [17, 17, 17]


def test_stragglers_follow_the_spread_and_the_seed() -> None:
    program = [Activity(f"a{i}", 100.0) for i in range(4000)]
    slow = with_stragglers(program, 0.1, seed=3)
    assert slow == with_stragglers(program, 0.1, seed=3)
    assert slow != with_stragglers(program, 0.1, seed=4)
    logs = [math.log(item.us / 100) for item in slow]
    assert statistics.mean(logs) == pytest.approx(0, abs=0.01)
    assert statistics.stdev(logs) == pytest.approx(0.1, rel=0.1)
    assert with_stragglers(program, 0.0, seed=1) == program


def test_a_deadlock_names_who_waits() -> None:
    with pytest.raises(Deadlock, match="a, b wait for each other"):
        simulate([Activity("a", 1, "s", after=("b",)), Activity("b", 1, "s")])


@pytest.mark.parametrize(
    ("activities", "problem"),
    [
        ([Activity("a", 1), Activity("a", 2)], "listed twice"),
        ([Activity("a", 1, after=("x",))], "waits for 'x'"),
        ([Activity("a", -1)], "lasts -1 us"),
        ([Activity("a", float("nan"))], "lasts nan us"),
        ([Activity("a", 1, demand={"nic": 1})], "asks for 'nic'"),
    ],
)
def test_wrong_activities(activities: list[Activity], problem: str) -> None:
    with pytest.raises(BadActivity, match=problem):
        simulate(activities, {"nic": 0})


GRAPH = TaskGraph(
    {"sm": 1, "nic": 1},
    (
        Task("a", (Mode(10.0, {"sm": 1}),)),
        Task("b", (Mode(3.0, {"sm": 1}),)),
        Task("send", (Mode(4.0, {"nic": 1}),)),
    ),
    edges=(("a", "send"),),
    repeat=(("send", "a", 1),),
)
STARTS = {"a": 0.0, "b": 10.0, "send": 10.0}


def test_a_plan_replays_as_promised_and_degrades_with_stragglers() -> None:
    plan = plan_activities(GRAPH, Schedule(STARTS, interval_us=14.0), iterations=5)
    found = ends(plan, {"sm": 1, "nic": 1})
    assert found["send@4"] == pytest.approx(4 * 14 + 14)
    slow = ends(with_stragglers(plan, 0.3, seed=0), {"sm": 1, "nic": 1})
    assert slow["send@4"] != found["send@4"]
    once = ends(plan_activities(GRAPH, Schedule(STARTS)), {"sm": 1, "nic": 1})
    assert once == {"a": 10, "b": 13, "send": 14}


def test_a_schedule_scatters_around_what_it_promises() -> None:
    """Without scatter the promise; with it `a` and `send` are in a row: the median stays near, the worst is above."""
    for schedule in (Schedule(STARTS), Schedule(STARTS, interval_us=14.0)):
        assert scattered(GRAPH, schedule, 0.0) == pytest.approx([14.0] * 20)
        found = scattered(GRAPH, schedule, 0.2)
        assert statistics.median(found) == pytest.approx(14.0, rel=0.15)
        assert found[0] < 14.0 < found[-1]
