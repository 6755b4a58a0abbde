"""Task graphs for the tests, in the JSON form of `moec overlap`."""

from __future__ import annotations

import random
from typing import Any

Json = dict[str, Any]

DECODE_US = {"attn0": 60, "attn1": 180, "shared": 40, "dispatch": 190, "mlp": 90, "combine": 360}
DECODE_EDGES = [
    ("attn0", "attn1"),
    ("attn1", "dispatch"),
    ("dispatch", "mlp"),
    ("mlp", "combine"),
    ("attn1", "shared"),
]


def decode_layer(links: int = 1, durations: dict[str, int] = DECODE_US) -> Json:
    """A layer of DeepSeek-V3 decode with two micro-batches, attention in two parts; communication takes no SMs."""
    graph: Json = {"resources": {"sm": 1, "nic": links}, "tasks": [], "edges": [], "repeat": []}
    for batch in (0, 1):
        for name, us in durations.items():
            resource = "nic" if name in ("dispatch", "combine") else "sm"
            graph["tasks"].append({"name": f"{name}.{batch}", "us": us, "uses": {resource: 1}})
        graph["edges"] += [[f"{a}.{batch}", f"{b}.{batch}"] for a, b in DECODE_EDGES]
        graph["repeat"] += [[f"{last}.{batch}", f"attn0.{batch}", 1] for last in ("combine", "shared")]
    return graph


def random_tasks(seed: int, size: int, longest: int = 400, tables: bool = True) -> Json:
    """A random graph on SMs, a link and NICs, with SM shares and tables over SM counts."""
    draw = random.Random(seed)
    tasks: list[Json] = []
    for i in range(size):
        task: Json = {"name": f"t{i}", "us": draw.randint(1, longest)}
        kind = draw.choice(["compute", "link", "table"] if tables else ["compute", "link"])
        if kind == "compute":
            task["uses"] = {"sm": draw.choice([48, 64, 96, 132])}
        elif kind == "link":
            task["uses"] = {"sm": draw.choice([8, 16, 24]), draw.choice(["nvlink", "nic"]): 1}
        else:
            task["us"] = {str(count): -(-task["us"] * 132 // count) for count in (66, 108, 132)}
        tasks.append(task)
    chance = draw.choice([1.0, 2.0, 3.0]) / size
    edges = [[f"t{i}", f"t{j}"] for j in range(size) for i in range(j) if draw.random() < chance]
    return {"resources": {"sm": 132, "nvlink": 1, "nic": draw.choice([1, 2])}, "tasks": tasks, "edges": edges}


def random_loop(seed: int, size: int, longest: int) -> Json:
    """A random graph that repeats: some tasks wait for others of one or two iterations before."""
    graph = random_tasks(seed, size, longest, tables=False)
    draw = random.Random(seed)
    graph["repeat"] = [
        [f"t{max(pair)}", f"t{min(pair)}", draw.randint(1, 2)]
        for pair in (draw.sample(range(size), 2) for _ in range(draw.randint(1, size // 2)))
    ]
    return graph


def modes(task: Json) -> list[tuple[int, dict[str, int]]]:
    """(duration, uses) of each way to run a task."""
    if isinstance(task["us"], dict):
        return [(us, {**task.get("uses", {}), "sm": int(count)}) for count, us in task["us"].items()]
    return [(task["us"], task.get("uses", {}))]
