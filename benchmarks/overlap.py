"""How close `moec overlap` comes to an exact solver, and what the schedules of MoE layers and pipelines reach.

python benchmarks/overlap.py                    200 random graphs against CP-SAT with 10 s each, about an hour
python benchmarks/overlap.py --repeat           the same for graphs that repeat: intervals
python benchmarks/overlap.py --only graphs --seed 40 --graphs 20   a part of them, for a machine that others use too
python benchmarks/overlap.py --graphs 6 --exact-seconds 1      small enough for CI
python benchmarks/overlap.py --out results.json                the numbers as JSON too
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moec.passes.scheduling import exposed_communication, graph_from_json, solve
from moec.simulate.pipeline import SCHEDULES, pipeline
from moec.simulate.pipeline_graph import chains_of, pipeline_graph, published_schedule
from moec.simulate.step import ChunkTimes, bubble_formula, pipeline_timeline, report_step

Json = dict[str, Any]

DECODE_US = {"attn0": 60, "attn1": 180, "shared": 40, "dispatch": 190, "mlp": 90, "combine": 360}
_PATIENCE = 6
"""Wall time that the exact solver may take on a busy machine, in multiples of its own limit."""

DECODE_EDGES = ["attn0 attn1", "attn1 dispatch", "dispatch mlp", "mlp combine", "attn1 shared"]


def main() -> None:
    options = _options()
    console = Console(width=110)
    results: Json = {}
    if options.only in (None, "graphs"):
        summary = random_graphs(options.graphs, options.exact_seconds, options.seed, options.repeat)
        results["random_graphs"] = summary
        console.print(
            f"{summary['graphs']} random graphs of 20-60 tasks{', repeating,' if options.repeat else ''} against "
            f"CP-SAT with {options.exact_seconds:g} s: median {summary['median']:.4f}, 95 % at most "
            f"{summary['p95']:.4f}, worst {summary['worst']:.4f}; "
            f"slowest {summary['slowest_s']:.2f} s ({summary['most_cpu_s']:.2f} s of CPU)"
        )
    if options.only in (None, "decode"):
        results["decode_layers"] = [decode_layer("one NIC", 1), decode_layer("a NIC for each micro-batch", 2)]
        console.print(_table("Decode layer, two micro-batches", results["decode_layers"]))
    if options.only in (None, "pipelines"):
        results["pipelines"] = [pipelines(name) for name in SCHEDULES]
        results["found_pipelines"] = [
            found_pipeline(name, ranks, count, weight)
            for ranks, count in ((4, 8), (4, 12), (6, 12))
            for weight in (1.0, 0.7)
            for name in SCHEDULES
        ]
        console.print(_table("Pipelines, 16 stages", results["pipelines"]))
        console.print(_table("Pipelines found under the memory of published ones", results["found_pipelines"]))
    if options.out:
        temporary = options.out.with_name(f".{options.out.name}.part")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(temporary, options.out)


def random_graphs(count: int, exact_seconds: float, seed: int, repeat: bool = False) -> Json:
    """Makespans (of graphs that repeat: intervals) of moec over those of CP-SAT alone, on `count` random graphs."""
    solve(graph_from_json({"tasks": []}))  # loads the solver
    rows = []
    for k in range(count):
        data = random_loop(seed + k) if repeat else random_graph(seed + k)
        began, cpu = time.perf_counter(), time.process_time()
        found = solve(graph_from_json(data), soon=True)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        exact, proven = (exact_interval if repeat else exact_makespan)(data, exact_seconds)
        reached = found.interval_us if found.interval_us is not None else found.makespan_us
        rows.append(
            {
                "seed": seed + k,
                "tasks": len(data["tasks"]),
                "found_us": reached,
                "exact_us": exact,
                "ratio": reached / exact,
                "optimal": found.optimal,
                "exact_optimal": proven,
                "seconds": seconds,
                "cpu_seconds": cpu,
            }
        )
    ratios = sorted(row["ratio"] for row in rows)
    return {
        "graphs": count,
        "median": statistics.median(ratios),
        "p95": ratios[min(int(0.95 * count), count - 1)],
        "worst": ratios[-1],
        "slowest_s": max(row["seconds"] for row in rows),
        "most_cpu_s": max(row["cpu_seconds"] for row in rows),
        "rows": rows,
    }


def random_graph(seed: int) -> Json:
    """20 to 60 tasks of one of four kinds: whole units, SM shares, four resources, tables over SM counts."""
    draw = random.Random(seed)
    size, kind = draw.randint(20, 60), seed % 4
    capacity = {"sm": 132, "nvlink": 2, "nic": 1, "hbm": 10} if kind == 2 else {"sm": 132, "nvlink": 1, "nic": 1}
    tasks = [{"name": f"t{i}", **_random_task(draw, kind, capacity)} for i in range(size)]
    chance = draw.choice([1.0, 1.5, 2.5]) * 2 / size
    edges = [
        [f"t{i}", f"t{j}"]
        for i in range(size)
        for j in range(i + 1, size)
        if draw.random() < (chance if j - i < size / 4 else chance / 4)
    ]
    return {"resources": capacity, "tasks": tasks, "edges": edges}


def random_loop(seed: int) -> Json:
    """A graph of `random_graph` for ever: some early tasks wait for late ones of one or two iterations before."""
    data = random_graph(seed)
    size, draw = len(data["tasks"]), random.Random(seed + 1)
    pairs = [sorted(draw.sample(range(size), 2)) for _ in range(draw.randint(1, size // 2))]
    data["repeat"] = [[f"t{late}", f"t{early}", draw.randint(1, 2)] for early, late in pairs]
    return data


def _random_task(draw: random.Random, kind: int, capacity: dict[str, int]) -> Json:
    if kind == 0:
        resource = draw.choice(["sm", "sm", "nvlink", "nic"])
        return {"us": draw.randint(10, 400), "uses": {resource: capacity[resource]}}
    if kind == 2:
        return {
            "us": draw.randint(1, 300),
            "uses": {r: draw.randint(1, c) for r, c in capacity.items() if draw.random() < 0.5},
        }
    if draw.random() < 0.5:
        return {
            "us": draw.randint(50, 800),
            "uses": {"sm": draw.choice([8, 16, 24]), draw.choice(["nvlink", "nic"]): 1},
        }
    if kind == 1:
        return {"us": draw.randint(10, 1000), "uses": {"sm": draw.choice([60, 80, 100, 112])}}
    work = draw.randint(100, 1200)
    return {"us": {str(count): round(work * 132 / count) for count in (88, 108, 120, 132)}}


def exact_makespan(data: Json, seconds: float) -> tuple[float, bool]:
    """What a plain CP-SAT model finds in so many seconds of every core, and whether it is proven."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    horizon = _horizon(data)
    held: dict[str, list[tuple[Any, int]]] = {name: [] for name in data["resources"]}
    starts, ends = ({task["name"]: model.new_int_var(0, horizon, "") for task in data["tasks"]} for _ in range(2))
    for task in data["tasks"]:
        name, choices = task["name"], _modes(task)
        for literal, (us, uses) in zip(_literals(model, choices), choices, strict=True):
            interval = model.new_optional_interval_var(starts[name], us, ends[name], literal, "")
            for resource, amount in uses.items():
                held[resource].append((interval, amount))
    for before, after in data["edges"]:
        model.add(starts[after] >= ends[before])
    for resource, capacity in data["resources"].items():
        model.add_cumulative([i for i, _ in held[resource]], [a for _, a in held[resource]], capacity)
    makespan = model.new_int_var(0, horizon, "")
    model.add_max_equality(makespan, list(ends.values()))
    model.minimize(makespan)
    return _least(model, horizon, seconds)


def exact_interval(data: Json, seconds: float) -> tuple[float, bool]:
    """As `exact_makespan`, the least whole interval of a graph that repeats.

    Task i starts at phase_i + stage_i * interval. An iteration that runs for ever shows in one interval as every task
    in all the laps that reach into it.
    """
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    horizon, laps = _horizon(data), 3
    interval = model.new_int_var(max(1, max(us for t in data["tasks"] for us, _ in _modes(t)) // laps), horizon, "")
    held: dict[str, list[tuple[Any, int]]] = {name: [] for name in data["resources"]}
    starts, durations = {}, {}
    for task in data["tasks"]:
        name, choices = task["name"], _modes(task)
        phase, stage, turned = (model.new_int_var(0, horizon, "") for _ in range(3))
        model.add(phase < interval)
        model.add_multiplication_equality(turned, [stage, interval])
        starts[name] = phase + turned
        literals = _literals(model, choices)
        durations[name] = sum(us * b for (us, _), b in zip(choices, literals, strict=True))
        for lap in range(laps + 1):
            start = model.new_int_var(-lap * horizon, horizon, "")
            model.add(start == phase - lap * interval)
            for literal, (us, uses) in zip(literals, choices, strict=True):
                shown = model.new_optional_fixed_size_interval_var(start, us, literal, "")
                for resource, amount in uses.items():
                    held[resource].append((shown, amount))
    for before, after, distance in [*((a, b, 0) for a, b in data["edges"]), *data["repeat"]]:
        model.add(starts[after] + distance * interval >= starts[before] + durations[before])
    for resource, capacity in data["resources"].items():
        model.add_cumulative([i for i, _ in held[resource]], [a for _, a in held[resource]], capacity)
    model.minimize(interval)
    return _least(model, horizon, seconds)


def _least(model: Any, horizon: int, seconds: float) -> tuple[float, bool]:
    """The least objective found in so many seconds of every core, and whether it is proven.

    The limit is on CPU time, so that the solver gets its due on a machine that is busy with other things.
    """
    from ortools.sat.python import cp_model

    solver, cores = cp_model.CpSolver(), len(os.sched_getaffinity(0))
    solver.parameters.num_workers = cores
    solver.parameters.max_time_in_seconds = _PATIENCE * seconds
    ended, deadline = threading.Event(), time.process_time() + cores * seconds

    def watch() -> None:
        while not ended.wait(0.05):
            if time.process_time() > deadline:
                solver.stop_search()

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = solver.solve(model)
    ended.set()
    watcher.join()
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return float(horizon), False
    return solver.objective_value, status == cp_model.OPTIMAL


def _horizon(data: Json) -> int:
    return sum(max(us for us, _ in _modes(task)) for task in data["tasks"])


def _literals(model: Any, choices: list[Any]) -> list[Any]:
    """One for each way to run a task, of which one is true."""
    literals = [model.new_bool_var("") for _ in choices]
    model.add_exactly_one(literals)
    return literals


def _modes(task: Json) -> list[tuple[int, dict[str, int]]]:
    if isinstance(task["us"], dict):
        return [(us, {**task.get("uses", {}), "sm": int(count)}) for count, us in task["us"].items()]
    return [(task["us"], task["uses"])]


def decode_layer(name: str, nics: int) -> Json:
    """The interval of a DeepSeek-V3 decode layer with attention in two parts and transfers that take no SMs."""
    data: Json = {"resources": {"sm": 1, "nic": nics}, "tasks": [], "edges": [], "repeat": []}
    for batch in "01":
        for task, us in DECODE_US.items():
            uses = {"nic": 1} if task in ("dispatch", "combine") else {"sm": 1}
            data["tasks"].append({"name": f"{task}.{batch}", "us": us, "uses": uses})
        data["edges"] += [[f"{end}.{batch}" for end in edge.split()] for edge in DECODE_EDGES]
        data["repeat"] += [[f"{last}.{batch}", f"attn0.{batch}", 1] for last in ("combine", "shared")]
    graph = graph_from_json(data)
    began = time.perf_counter()
    found = solve(graph)
    return {
        "links": name,
        "interval_us": found.interval_us,
        "bound_us": found.interval_bound_us,
        "optimal": found.optimal,
        "simple_bound_us": max(found.bounds["interval_resources"], found.bounds["interval_recurrences"]),
        "exposed_us": sum(end - start for start, end in exposed_communication(graph, found.schedule)),
        "seconds": round(time.perf_counter() - began, 2),
    }


def pipelines(schedule: str) -> Json:
    """Bubble and memory of a simulated pipeline of 16 stages beside the formula of the DeepSeek-V3 report."""
    times = ChunkTimes(forward=1.0, backward=2.0, weight=1.0, overlapped=2.6)
    pipe = pipeline(schedule, 16, 64)
    step = report_step(pipe, pipeline_timeline(pipe, times))
    return {
        "schedule": schedule,
        "ranks": len(pipe.programs),
        "length": round(step.length, 6),
        "bubble": round(max(step.idle), 6),
        "formula": round(bubble_formula(schedule, 16, times), 6),
        "parameters": pipe.copies,
        "activations": max(step.activations),
    }


def found_pipeline(schedule: str, ranks: int, micro_batches: int, weight: float) -> Json:
    """What the scheduler makes of the passes of a published pipeline; nothing is gained by overlapping two."""
    folded = schedule == "dualpipev"
    part = 0.5 if folded else 1.0
    times = ChunkTimes(forward=part, backward=2 * part, weight=weight * part, overlapped=3 * part)
    pipe = pipeline(schedule, 2 * ranks if folded else ranks, micro_batches)
    step = report_step(pipe, pipeline_timeline(pipe, times))
    graph = pipeline_graph(chains_of(pipe), times)
    found = solve(graph, effort=5, start=published_schedule(pipe, times))
    return {
        "schedule": schedule,
        "ranks": ranks,
        "micro_batches": micro_batches,
        "weight": weight,
        "tasks": len(graph.tasks),
        "published": round(step.length, 6),
        "found": round(found.makespan_us, 6),
        "bound": round(found.lower_bound_us, 6),
        "optimal": found.optimal,
    }


def _table(title: str, rows: list[Json]) -> Table:
    table = Table(*rows[0], title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*(f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=200, help="random graphs (default 200)")
    parser.add_argument("--exact-seconds", type=float, default=10.0, help="CP-SAT's time for each (default 10)")
    parser.add_argument("--repeat", action="store_true", help="random graphs that repeat")
    parser.add_argument("--only", choices=("graphs", "decode", "pipelines"), help="one of the parts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first graph")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
