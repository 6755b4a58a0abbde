"""Steps without a stream wait for all streams and all wait for them, as the IR says of ops: on any executor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moec.runtime.cuda.executor import Executor
from moec.runtime.cuda.pieces import PiecewiseExecutor


class Recorder:
    """A driver that notes what is issued where; streams and events are numbers."""

    def __init__(self) -> None:
        self.count, self.issued = 0, list[tuple[str, int, int]]()

    def stream(self) -> int:
        self.count += 1
        return self.count

    event = stream

    def zero(self, at: int, size: int, stream: int) -> None:
        self.issued.append(("fill", at, stream))

    def record(self, event: int, stream: int) -> None:
        self.issued.append(("record", event, stream))

    def wait_for(self, stream: int, event: int) -> None:
        self.issued.append(("wait", event, stream))


def fill(at: int, stream: str | None = None) -> dict[str, Any]:
    return {"fill": at, "bytes": "8", **({"stream": stream} if stream else {})}


STEPS = [
    fill(0),
    {"repeat": [0, 1], "steps": [fill(1, "a"), fill(2, "b"), {"record": 7, "stream": "b"}, fill(3, "a")]},
    fill(4),
    fill(5),
    fill(6, "b"),
]


def ended_before(issued: list[tuple[str, int, int]]) -> list[set[int]]:
    """For each fill the places in `issued` that have surely ended when it begins, from the stream order and events."""
    done: dict[int, set[int]] = {}
    events: dict[int, set[int]] = {}
    found = []
    for at, (kind, number, stream) in enumerate(issued):
        mine = done.setdefault(stream, set())
        if kind == "record":
            events[number] = set(mine)
        elif kind == "wait":
            mine |= events[number]
        else:
            found.append(set(mine))
            mine.add(at)
    return found


@pytest.mark.parametrize("piecewise", [False, True])
def test_steps_without_a_stream_are_fences(piecewise: bool) -> None:
    driver: Any = Recorder()
    memory: Any = SimpleNamespace(address=lambda reference, layer: reference)
    entry: Any = SimpleNamespace(steps=STEPS, name="decode")
    begun: Any = SimpleNamespace(begin=lambda phase: None)
    executor = PiecewiseExecutor(driver, {}, memory, entry, begun) if piecewise else Executor(driver, {}, memory, entry)
    executor.run({}, lambda: None, lambda: None)
    fills = [(at, number) for at, (kind, number, _) in enumerate(driver.issued) if kind == "fill"]
    assert [number for _, number in fills] == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6]
    before = ended_before(driver.issued)
    for (at, number), ended in zip(fills, before, strict=True):
        earlier = {a for a, _ in fills if a < at}
        if number in (0, 4, 5):
            assert earlier <= ended, f"{number} does not wait for all"
        assert {a for a in earlier if driver.issued[a][1] in (0, 4, 5)} <= ended, f"{number} does not wait for a fence"
    # Streams are apart otherwise.
    second = next(i for i, (_, number) in enumerate(fills) if number == 2)
    assert fills[second - 1][0] not in before[second]
