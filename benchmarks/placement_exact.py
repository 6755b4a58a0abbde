"""Two slots a device beside the exact optimum: how much a search leaves, and how much the greedy balancer does.

    python benchmarks/placement_exact.py [--seed N] [--seconds S] [--layers N] [--shapes 18x32,36x64,...] [--out F.json]

Every layer is solved by `exact_pairs` (CP-SAT), started from the search's answer, until its optimum is proven or the
seconds are over; then the proven lower bound takes the optimum's place, so that no ratio is flattered.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from placement import greedy, skewed

from moec.passes.placement import Problem, place
from moec.passes.placement.exact import exact_pairs

EXPONENTS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
PLACED = 58
PROVEN = 1 + 2e-4
"""An optimum counts as proven when its bound is this near: the solver brackets loads to 1e-4."""


def compare(devices: int, experts: int, exponent: float, seed: int, layers: int, seconds: float) -> dict[str, Any]:
    """Greatest device loads over the optimum (or its bound), for the search and the greedy.

    58 layers are placed together, so that each has the share of the search that it has in a model; the first `layers`
    of them are solved.
    """
    loads = skewed(np.random.default_rng([seed, devices, round(100 * exponent)]), PLACED, experts, exponent)
    problem = Problem.of(loads, devices=devices, slots_per_device=2)
    began = time.process_time()
    result = place(problem)
    took = time.process_time() - began
    published = greedy(problem).greatest_loads(loads)
    ours, theirs, proven = [], [], 0
    for layer in range(layers):
        counts = np.bincount(result.placement.physical_to_logical_map[layer], minlength=experts)
        exact = exact_pairs(loads[layer], 2 * devices, seconds=seconds, hint=counts)
        is_proven = exact.greatest <= exact.lower * PROVEN
        best = exact.greatest if is_proven else exact.lower
        proven += is_proven
        ours.append(result.greatest[layer] / best)
        theirs.append(published[layer] / best)
    return {
        "devices": devices, "experts": experts, "exponent": exponent, "layers": layers, "proven": proven,
        "mean": float(np.mean(ours)), "worst": max(ours), "greedy_mean": float(np.mean(theirs)),
        "greedy_worst": max(theirs), "worse_than_greedy": int((result.greatest > published * (1 + 1e-9)).sum()),
        "seconds": took,
    }  # fmt: skip


def run(
    shapes: list[tuple[int, int]], seed: int, layers: int, seconds: float, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    show("greatest device load over the exact optimum (its lower bound where unproven): mean of layers (worst)")
    show(f"{'devices, experts':18} {'1/rank^a':>8} {'greedy':>16} {'moec':>18} {'worse':>5} {'proven':>7} {'s':>5}")
    rows = []
    for devices, experts in shapes:
        for exponent in EXPONENTS:
            row = compare(devices, experts, exponent, seed, layers, seconds)
            rows.append(row)
            show(
                f"{f'{devices} x 2, {experts}':18} {exponent:8.1f} {row['greedy_mean']:7.4f} "
                f"({row['greedy_worst']:.4f}) {row['mean']:8.5f} ({row['worst']:.5f}) {row['worse_than_greedy']:5d} "
                f"{row['proven']:3d}/{layers:<3d} {row['seconds']:5.2f}"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Placements with two slots a device beside the exact optimum.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the exact solver, each layer")
    parser.add_argument("--layers", type=int, default=4, help="of each shape and exponent")
    parser.add_argument("--shapes", default="12x20,18x32,36x64,72x128", help="devices x experts")
    parser.add_argument("--out", type=Path, default=Path("placement-exact.json"), help="where the figures go")
    options = parser.parse_args()
    shapes = [(int(d), int(e)) for d, e in (shape.split("x") for shape in options.shapes.split(","))]
    rows = run(shapes, options.seed, options.layers, options.seconds, lambda line: print(line, flush=True))
    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    worst, all_proven = max(row["worst"] for row in rows), sum(row["proven"] for row in rows)
    print(f"worst {worst:.5f}; {all_proven} of {len(rows) * options.layers} layers proven; wrote {options.out}")


if __name__ == "__main__":
    main()
