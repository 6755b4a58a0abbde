"""`moec overlap`: schedule a user's own task graph and say how far the answer is from its bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from moec.passes.scheduling import Solution, TaskGraph
    from moec.simulate.trace import Span

_SHOWN_ITERATIONS = 4
"""Iterations of a cyclic schedule in a trace: enough to see the steady state between filling and draining."""

_EXAMPLES = """\
moec overlap tasks.json --trace timeline.json
moec overlap tasks.json --spread 0.1
"""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog=_EXAMPLES)
    def overlap(
        tasks: Annotated[Path, typer.Argument(metavar="TASKS.json", help="Tasks, resources, edges, repeat edges.")],
        trace: Annotated[
            Path | None, typer.Option(metavar="OUT", help="Write the schedule as a Perfetto trace.")
        ] = None,
        spread: Annotated[
            float,
            typer.Option(
                min=0.0, max=5.0, help="Relative scatter of durations, such as 0.05: what is left of the plan."
            ),
        ] = 0.0,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")
        ] = False,
        time_limit: Annotated[
            float | None,
            typer.Option(
                metavar="S",
                min=0.0,
                help="Seconds of search; a proof ends it earlier. Default: a fixed amount of work.",
            ),
        ] = None,
    ) -> None:
        """Schedule a task graph over shared resources.

        The shortest makespan, or the shortest interval where it repeats, beside what bounds it.
        """
        from rich.console import Console

        from moec.passes.scheduling import read_tasks, solve
        from moec.simulate.trace import write_trace

        graph = read_tasks(tasks)
        notes = Console(stderr=True, highlight=False)
        with notes.status(f"scheduling {len(graph.tasks)} tasks"):
            solution = solve(graph, time_limit, soon=True)
        if trace is not None:
            write_trace(trace, _spans(graph, solution))
            notes.print(f"wrote {trace} (open it at ui.perfetto.dev)", soft_wrap=True)
        if as_json:
            print(json.dumps(_answer(graph, solution) | _scatter(graph, solution, spread), allow_nan=False))
        else:
            _report(Console(highlight=False), graph, solution, _scatter(graph, solution, spread))


def _answer(graph: TaskGraph, solution: Solution) -> dict[str, Any]:
    from moec.passes.scheduling import exposed_communication, orders, utilisation

    schedule = solution.schedule
    return {
        "makespan_us": solution.makespan_us,
        "lower_bound_us": solution.lower_bound_us,
        "optimal": solution.optimal,
        "interval_us": solution.interval_us,
        "interval_bound_us": solution.interval_bound_us,
        "order": orders(graph, schedule),
        "start_us": dict(schedule.start_us),
        "duration_us": {task.name: schedule.mode_of(task).us for task in graph.tasks},
        "uses": {task.name: dict(schedule.mode_of(task).uses) for task in graph.tasks},
        "bounds_us": solution.bounds,
        "utilisation": utilisation(graph, schedule),
        "exposed_us": sum(end - start for start, end in exposed_communication(graph, schedule)),
    }


def _scatter(graph: TaskGraph, solution: Solution, spread: float) -> dict[str, float]:
    """Makespan or interval when durations scatter, the order kept: the middle and the greatest of twenty draws."""
    from statistics import median

    from moec.simulate.replay import scattered

    if not spread:
        return {}
    found = scattered(graph, solution.schedule, spread)
    return {"scattered_median_us": median(found), "scattered_worst_us": found[-1]}


def _report(console: Console, graph: TaskGraph, solution: Solution, scatter: dict[str, float]) -> None:
    from rich.table import Table

    answer = _answer(graph, solution)
    if solution.interval_us is not None and solution.interval_bound_us is not None:
        verdict = _verdict(solution.interval_us, solution.interval_bound_us, solution.optimal)
        console.print(f"interval  {_us(solution.interval_us)} an iteration, {verdict}", soft_wrap=True)
        console.print(f"makespan  {_us(solution.makespan_us)} from first start to last end of one iteration")
    else:
        verdict = _verdict(solution.makespan_us, solution.lower_bound_us, solution.optimal)
        console.print(f"makespan  {_us(solution.makespan_us)}, {verdict}", soft_wrap=True)
    bounds = ", ".join(f"{name.replace('_', ' ')} {_us(value)}" for name, value in solution.bounds.items())
    console.print(f"bounds    {bounds}", soft_wrap=True)
    span = solution.makespan_us if solution.interval_us is None else solution.interval_us
    share = answer["exposed_us"] / span if span else 0.0
    console.print(f"exposed   {_us(answer['exposed_us'])} of communication alone ({share:.1%})")

    if scatter:
        middle, worst = scatter.values()
        console.print(
            f"scatter   median {_us(middle)}, worst of 20 draws {_us(worst)}, in the same order", soft_wrap=True
        )

    table = Table("resource", "busy", "order", box=None, pad_edge=False)
    for resource, busy in answer["utilisation"].items():
        table.add_row(resource, f"{busy:.1%}", " ".join(answer["order"][resource]) or "-")
    console.print(table)
    shares = [(task.name, solution.schedule.mode_of(task).share) for task in graph.tasks]
    if chosen := [f"{name} {share:g}" for name, share in shares if share is not None]:
        console.print(f"SM shares {'  '.join(chosen)}", soft_wrap=True)


def _verdict(value: float, bound: float, optimal: bool) -> str:
    gap = value / bound - 1 if bound else (0.0 if optimal else float("inf"))
    return f"bound {_us(bound)}, gap {gap:.2%}{' (proven optimal)' if optimal else ''}"


def _us(value: float) -> str:
    return f"{value:.10g} us"


def _spans(graph: TaskGraph, solution: Solution) -> list[Span]:
    """One track a resource, tasks on all that they hold, and the exposed communication on its own."""
    from moec.passes.scheduling import exposed_communication
    from moec.simulate.trace import EXPOSED_TRACK, Span

    schedule, interval = solution.schedule, solution.interval_us
    iterations = 1 if interval is None else _SHOWN_ITERATIONS
    spans = []
    for iteration in range(iterations):
        offset = iteration * (interval or 0.0)
        for task in graph.tasks:
            mode = schedule.mode_of(task)
            held = {resource: use for resource, use in mode.uses.items() if use > 0}
            args = {"uses": held, "iteration": iteration}
            start = offset + schedule.start_us[task.name]
            tracks = list(held) or ["(no resource)"]
            spans += [Span(task.name, track, start, mode.us, args=args) for track in tracks]
    # In a cyclic schedule the pieces are those of one interval of the steady state: the last one that is whole.
    offset = 0.0 if interval is None else (iterations - 1) * interval
    for start, end in exposed_communication(graph, schedule):
        spans.append(Span("exposed", EXPOSED_TRACK, offset + start, end - start))
    rank = {name: position for position, name in enumerate([*graph.resources, "(no resource)", EXPOSED_TRACK])}
    return sorted(spans, key=lambda span: rank[span.track])
