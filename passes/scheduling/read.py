"""Read a task graph from JSON, strictly: an unknown field or a doubtful number is refused with its place.

{"resources": {"sm": 132, "nic": 1},
 "tasks": [{"name": "attn", "us": {"108": 1300, "132": 1100}}, {"name": "send", "us": 900, "uses": {"nic": 1}}],
 "edges": [["attn", "send"]],
 "repeat": [["send", "attn", 1]]}
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moec.errors import near
from moec.passes.scheduling.errors import (
    BadField,
    BadJson,
    DuplicateName,
    OverCapacity,
    UnknownField,
    UnknownResource,
    UnreadableTasks,
)
from moec.passes.scheduling.graph import DIVISIBLE, Mode, Task, TaskGraph

_GRAPH_FIELDS = ("resources", "tasks", "edges", "repeat", "communication")
_TASK_FIELDS = ("name", "us", "uses")


def read_tasks(path: str | Path) -> TaskGraph:
    """The task graph in a JSON file; raises the `InputError`s of `moec.passes.scheduling.errors`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UnreadableTasks(path=path, reason=reason) from None
    return parse_tasks(text, str(path))


def parse_tasks(text: str, source: str = "<text>") -> TaskGraph:
    """The task graph in JSON text; `source` is the name used in messages about the text."""
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise BadJson(path=source, line=error.lineno, column=error.colno, reason=error.msg) from None
    except RecursionError:
        raise BadJson(path=source, line=1, column=1, reason="nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise BadJson(path=source, line=1, column=1, reason=str(error).partition(";")[0]) from None
    return graph_from_json(data)


def graph_from_json(data: Any) -> TaskGraph:
    """The task graph in decoded JSON (dicts, lists, numbers, strings)."""
    _fields(data, "the task graph", _GRAPH_FIELDS, required=("tasks",))
    resources = {
        name: _number(value, f"resources.{name}")
        for name, value in _typed(data.get("resources", {}), dict, "resources", "an object").items()
    }
    tasks = _typed(data["tasks"], list, "tasks", "a list")
    communication = data.get("communication")
    return TaskGraph(
        resources=resources,
        tasks=tuple(_task(item, i, resources) for i, item in enumerate(tasks)),
        edges=tuple(_edge(item, f"edges[{i}]") for i, item in enumerate(_list(data, "edges"))),
        repeat=tuple(_repeat(item, f"repeat[{i}]") for i, item in enumerate(_list(data, "repeat"))),
        communication=None if communication is None else frozenset(_names(communication, "communication")),
    )


def _task(item: Any, position: int, resources: dict[str, float]) -> Task:
    where = f"tasks[{position}]"
    _fields(item, where, _TASK_FIELDS, required=("name",))
    name = _typed(item["name"], str, f"{where}.name", "a string")
    where = f"task {name!r}"
    _fields(item, where, _TASK_FIELDS, required=("us",))
    uses = {
        resource: _number(value, f"{where}, uses.{resource}")
        for resource, value in _typed(item.get("uses", {}), dict, f"{where}, uses", "an object").items()
    }
    if isinstance(item["us"], dict):
        return Task(name, _table(item["us"], uses, where, resources))
    return Task(name, (Mode(_number(item["us"], f"{where}, us"), uses),))


def _table(table: dict[str, Any], uses: dict[str, float], where: str, resources: dict[str, float]) -> tuple[Mode, ...]:
    """One mode a listed count; counts above the capacity cannot run here and are left out.

    A `uses` of the divisible resource beside a table is a cap on the counts that the task may take.
    """
    if DIVISIBLE not in resources:
        hint = near(DIVISIBLE, list(resources))
        raise UnknownResource(where=f"{where}, us (a table over SM counts)", name=DIVISIBLE, hint=hint)
    modes = []
    for key, value in table.items():
        count = _count(key, f"{where}, us")
        modes.append(Mode(_number(value, f"{where}, us[{key}]"), {**uses, DIVISIBLE: count}, count))
    if not modes:
        raise BadField(where=f"{where}, us", expected="a number or a table with an entry", got="an empty table")
    limit = min(resources[DIVISIBLE], uses.get(DIVISIBLE, math.inf))
    fitting = tuple(mode for mode in modes if mode.uses[DIVISIBLE] <= limit)
    if not fitting:
        least = min(mode.uses[DIVISIBLE] for mode in modes)
        raise OverCapacity(where=where, use=least, resource=DIVISIBLE, capacity=limit)
    return fitting


def _count(key: str, where: str) -> float:
    try:
        count = float(key)
    except ValueError:
        count = math.nan
    if not (math.isfinite(count) and count > 0):
        raise BadField(where=where, expected="counts of SMs as keys", got=repr(key))
    return count


def _edge(item: Any, where: str) -> tuple[str, str]:
    if not (isinstance(item, list) and len(item) == 2 and all(isinstance(end, str) for end in item)):
        raise BadField(where=where, expected='["before", "after"]', got=_show(item))
    return item[0], item[1]


def _repeat(item: Any, where: str) -> tuple[str, str, int]:
    expected = '["before", "after", iterations later]'
    if not (isinstance(item, list) and len(item) == 3 and all(isinstance(end, str) for end in item[:2])):
        raise BadField(where=where, expected=expected, got=_show(item))
    distance = _number(item[2], where)
    if distance != int(distance):
        raise BadField(where=where, expected="a whole number of iterations", got=_show(item[2]))
    return item[0], item[1], int(distance)


def _fields(item: Any, where: str, known: tuple[str, ...], required: tuple[str, ...]) -> None:
    _typed(item, dict, where, "an object")
    for name in item:
        if name not in known:
            raise UnknownField(where=where, field=name, hint=near(name, list(known)))
    for name in required:
        if name not in item:
            raise BadField(where=where, expected=f"a field {name!r}", got="none")


def _typed(value: Any, kind: type, where: str, expected: str) -> Any:
    if not isinstance(value, kind):
        raise BadField(where=where, expected=expected, got=_show(value))
    return value


def _list(data: dict[str, Any], name: str) -> list[Any]:
    items: list[Any] = _typed(data.get(name, []), list, name, "a list")
    return items


def _names(value: Any, where: str) -> list[str]:
    if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise BadField(where=where, expected="a list of resource names", got=_show(value))
    return value


def _number(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadField(where=where, expected="a finite number", got=_show(value))
    return number


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DuplicateName(where="an object of the file", name=twice)
    return found
