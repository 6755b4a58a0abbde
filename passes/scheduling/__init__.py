"""Scheduling of task graphs on shared resources: once (makespan) or for ever (initiation interval).

Plain data in, plain data out: `read_tasks` or `TaskGraph(...)`, then `solve`, then the `Solution` and what
`orders`, `utilisation` and `exposed_communication` read off its schedule. `check` refuses an illegal schedule.
"""

from moec.passes.scheduling.check import check
from moec.passes.scheduling.graph import Mode, Task, TaskGraph
from moec.passes.scheduling.read import graph_from_json, parse_tasks, read_tasks
from moec.passes.scheduling.schedule import Schedule, exposed_communication, makespan, orders, utilisation
from moec.passes.scheduling.solve import Repeating, Solution, solve
from moec.passes.scheduling.turns import by_turns

__all__ = [
    "Mode",
    "Repeating",
    "Schedule",
    "Solution",
    "Task",
    "TaskGraph",
    "by_turns",
    "check",
    "exposed_communication",
    "graph_from_json",
    "makespan",
    "orders",
    "parse_tasks",
    "read_tasks",
    "solve",
    "utilisation",
]
