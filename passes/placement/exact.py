"""Exact placements for small layers, and for two slots a device at any size: proven bounds, a yardstick.

Everything here works on one layer, `loads` float64[experts].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from ortools.sat.python import cp_model
from scipy.optimize import Bounds, LinearConstraint, milp

from moec.passes.placement import errors
from moec.passes.placement.bounds import lower_bound
from moec.passes.placement.counts import spread_widest
from moec.passes.placement.packing import Packing, pack
from moec.passes.placement.pairs import greatest_pair
from moec.passes.placement.placement import Placement
from moec.passes.placement.problem import Floats, Ints, Shares
from moec.passes.placement.solve import Result

# Loads become integers that sum to about this; sizes are rounded down, so that bounds stay bounds.
_SCALE = 10**9
_MOST_DECISIONS = 4000
# Two-slot loads are bracketed this closely.
_PRECISION = 1e-4
# So many replica counts of an expert are told apart, from the fewest that it needs.
_SEPARATE_COUNTS = 4


@dataclass(frozen=True)
class Exact:
    """`lower` <= optimum <= `greatest`, which the packing `experts` [devices, slots per device] reaches.

    `sizes` are the loads that the slots carry. Proven optimal when the two agree (to the solver's precision).
    """

    lower: float
    greatest: float
    packing: Packing


def prove(result: Result, *, shares: Shares, seconds: float) -> Result:
    """Run the exact solver on every layer for at most `seconds` each: better placements, where it finds any, and
    bounds raised to what it proved. For placements without groups; raises `SearchTooLarge`.
    """
    problem = result.problem
    even = shares == "even"
    mapping = result.placement.physical_to_logical_map.copy()
    share = result.placement.replica_shares.copy()
    bound = result.bound.copy()
    for layer in np.flatnonzero(result.greatest > result.bound * (1 + 1e-9)):
        found = exact_layer(
            problem.loads[layer], problem.devices, problem.slots, even=even, seconds=seconds, hint=mapping[layer]
        )
        bound[layer] = max(bound[layer], min(found.lower, result.greatest[layer]))
        if found.greatest < result.greatest[layer] * (1 - 1e-9):
            packing = Packing(found.packing.experts[None], found.packing.sizes[None])
            better = Placement.of_packing(replace(problem, loads=problem.loads[layer][None]), packing, even=even)
            mapping[layer], share[layer] = better.physical_to_logical_map[0], better.replica_shares[0]
    placement = replace(result.placement, physical_to_logical_map=mapping, replica_shares=share)
    return replace(result, placement=placement, greatest=placement.greatest_loads(problem.loads), bound=bound)


def exact_layer(
    loads: Floats, devices: int, slots: int, *, even: bool, seconds: float, hint: Ints | None = None
) -> Exact:
    """The least greatest device load of one layer; `hint` int64[slots] is a placement to start from."""
    if even and slots == 2 * devices:
        counts = None if hint is None else np.bincount(hint, minlength=len(loads))
        return exact_pairs(loads, slots, seconds=seconds, hint=counts)
    decisions = len(loads) * devices
    if decisions > _MOST_DECISIONS:
        raise errors.SearchTooLarge(limit=_MOST_DECISIONS, size=decisions)
    if even:
        return exact_even(loads, devices, slots, seconds=seconds, hint=hint)
    return exact_free(loads, devices, slots, seconds=seconds)


def exact_even(loads: Floats, devices: int, slots: int, *, seconds: float, hint: Ints | None = None) -> Exact:
    """Even shares: a replica count for each expert, and how many of the replicas each device takes (CP-SAT)."""
    experts, per_device = len(loads), slots // devices
    most = slots - experts + 1
    scale = _SCALE / max(float(loads.sum()), float(np.finfo(np.float64).tiny))
    model = cp_model.CpModel()
    known = lower_bound(loads[None], devices, slots)[0]
    limit = model.new_int_var(max(0, int(known * scale) - slots), _SCALE, "greatest")
    held: list[list[list[cp_model.IntVar]]] = []
    for _ in range(experts):
        chosen = [model.new_bool_var("") for _ in range(most)]
        model.add_exactly_one(chosen)
        held.append([])
        for count, flag in enumerate(chosen, start=1):
            parts = [model.new_int_var(0, min(count, per_device), "") for _ in range(devices)]
            model.add(sum(parts) == count * flag)
            held[-1].append(parts)
    device_loads = []
    for device in range(devices):
        model.add(sum(parts[device] for counts in held for parts in counts) == per_device)
        sizes = [
            int(load * scale / count) * parts[device]
            for load, counts in zip(loads, held, strict=True)
            for count, parts in enumerate(counts, start=1)
        ]
        device_loads.append(sum(sizes))
        model.add(device_loads[-1] <= limit)
    # Devices are alike: number them by falling load.
    for heavier, lighter in pairwise(device_loads):
        model.add(heavier >= lighter)
    model.minimize(limit)
    if hint is not None:
        _hint(model, held, loads, hint.reshape(devices, per_device))
    solver = _solver(seconds)
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Exact(solver.best_objective_bound / scale, np.inf, Packing(np.empty(0, np.int64), np.empty(0)))
    where = np.array([[[solver.value(v) for v in parts] for parts in counts] for counts in held]).sum(axis=1)
    total = where.sum(axis=1)
    at = np.stack([np.repeat(np.arange(experts), where[:, device]) for device in range(devices)])
    packing = Packing(at, (loads / total)[at])
    return Exact(solver.best_objective_bound / scale, float(packing.sizes.sum(axis=1).max()), packing)


def _hint(model: cp_model.CpModel, held: list[list[list[cp_model.IntVar]]], loads: Floats, placement: Ints) -> None:
    """Start from `placement` [devices, slots per device], its devices sorted as the model wants them."""
    total = np.bincount(placement.ravel(), minlength=len(loads))
    falling = np.argsort(-(loads / total)[placement].sum(axis=1), kind="stable")
    for expert, counts in enumerate(held):
        for count, parts in enumerate(counts, start=1):
            for device, part in enumerate(parts):
                here = int((placement[falling[device]] == expert).sum())
                model.add_hint(part, here if count == total[expert] else 0)


def exact_pairs(loads: Floats, slots: int, *, seconds: float, hint: Ints | None = None) -> Exact:
    """Two slots a device with even shares: bisection over the load, each step a feasibility question to CP-SAT.

    A load T is enough exactly when no replica is larger and, for every size x above T / 2, at most as many replicas
    are at least x as are at most T - x: each of the large ones then finds a partner of its own (Hall's theorem for
    nested sets). The bisection allows each expert only a few replicas more than it needs; the load that is then out
    of reach becomes a proven bound once it is also out of reach when experts with more replicas are taken
    optimistically. `seconds` limits all steps together.
    """
    devices = slots // 2
    counts = spread_widest(loads[None], slots)[0] if hint is None else hint
    greatest = float(greatest_pair(loads[None], counts[None])[0])
    proven = float(lower_bound(loads[None], devices, slots)[0])
    out_of_reach = proven
    left = seconds
    while greatest > out_of_reach * (1 + _PRECISION) and left > 0:
        target = (greatest + out_of_reach) / 2
        solver = _solver(left)
        status, found = _pairs_within(loads / target, slots, counts, solver, optimistic=False)
        left -= solver.wall_time
        if found is not None:
            counts = found
            greatest = float(greatest_pair(loads[None], counts[None])[0])
        elif status == cp_model.INFEASIBLE:
            out_of_reach = target
        else:
            break
    # Where that is too optimistic to be out of reach, once more with twice as many counts told apart.
    for separate in (_SEPARATE_COUNTS, 2 * _SEPARATE_COUNTS):
        if proven < out_of_reach and left > 0:
            solver = _solver(left)
            status, _ = _pairs_within(loads / out_of_reach, slots, counts, solver, optimistic=True, separate=separate)
            left -= solver.wall_time
            if status == cp_model.INFEASIBLE:
                proven = out_of_reach
    packing = pack(loads[None], counts[None], devices)
    return Exact(min(proven, greatest), greatest, Packing(packing.experts[0], packing.sizes[0]))


def _solver(seconds: float) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    # One worker and a fixed seed: the same answer every time.
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    return solver


def _pairs_within(
    loads: Floats,
    slots: int,
    hint: Ints,
    solver: cp_model.CpSolver,
    *,
    optimistic: bool,
    separate: int = _SEPARATE_COUNTS,
) -> tuple[cp_model.CpSolverStatus, Ints | None]:
    """Replica counts with which all pairs carry at most 1, and the solver's answer.

    An expert may have its fewest replicas or up to `separate - 1` more. With `optimistic` it may also have
    more, all as small as they could ever be, and replicas beyond that come in the smallest size there is: the
    question gets easier, so only "infeasible" means something, and no counts are returned.
    """
    model = cp_model.CpModel()
    most = slots - len(loads) + 1
    options: list[tuple[float, cp_model.LinearExprT]] = []
    flags: list[list[cp_model.IntVar]] = []
    many: list[cp_model.IntVar] = []
    fewest = np.maximum(1, np.ceil(loads * (1 - 1e-12))).astype(np.int64)
    if (fewest > most).any():
        return cp_model.INFEASIBLE, None
    for expert, load in enumerate(loads):
        counts = range(int(fewest[expert]), min(int(fewest[expert]) + separate, most + 1))
        flags.append([model.new_bool_var("") for _ in counts])
        for count, flag in zip(counts, flags[-1], strict=True):
            options.append((load / count, count * flag))
            model.add_hint(flag, int(hint[expert] == count))
        if optimistic and counts.stop <= most:
            many.append(model.new_bool_var(""))
            options.append((load / most, counts.stop * many[-1]))
            model.add_exactly_one([*flags[-1], many[-1]])
        else:
            model.add_exactly_one(flags[-1])
    if many:
        beyond = model.new_int_var(0, most, "")
        model.add(beyond <= most * sum(many))
        options.append((float(loads.min()) / most, beyond))
    model.add(sum(amount for _, amount in options) == slots)
    _pairs_fit(model, options, slots)
    status = solver.solve(model)
    if optimistic or status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return status, None
    chosen = np.array([[solver.value(flag) for flag in mine].index(1) for mine in flags])
    return status, fewest + chosen


def _pairs_fit(model: cp_model.CpModel, options: list[tuple[float, cp_model.LinearExprT]], slots: int) -> None:
    """Demand a partner for every replica larger than a half; `options` are sizes and how many replicas have them."""
    options.sort(key=lambda option: option[0])
    sizes = np.array([size for size, _ in options])
    # How many replicas there are up to each option, as a running sum: one short equation an option.
    running: list[cp_model.LinearExprT] = [0]
    for _, amount in options:
        total = model.new_int_var(0, slots, "")
        model.add(total == running[-1] + amount)
        running.append(total)
    large = int(np.searchsorted(sizes, 0.5 * (1 + 1e-12), side="right"))
    partners = np.searchsorted(sizes, 1 - sizes[large:] + 1e-12, side="right")
    for k, small in enumerate(partners, start=large):
        model.add(slots - running[k] <= running[small])


def exact_free(loads: Floats, devices: int, slots: int, *, seconds: float) -> Exact:
    """Free shares: a mixed-integer program over which devices hold an expert and what part they take (HiGHS)."""
    experts, per_device = len(loads), slots // devices
    cells = experts * devices
    total = max(float(loads.sum()), float(np.finfo(np.float64).tiny))
    # Variables: holds [experts, devices] (binary), part [experts, devices], greatest (relative to the total load).
    width = 2 * cells + 1
    holds, part = np.arange(cells).reshape(experts, devices), cells + np.arange(cells).reshape(experts, devices)
    linked = np.zeros((cells, width))
    linked[np.arange(cells), part.ravel()], linked[np.arange(cells), holds.ravel()] = 1, -1
    whole, room, load = np.zeros((experts, width)), np.zeros((devices, width)), np.zeros((devices, width))
    for expert in range(experts):
        whole[expert, part[expert]] = 1
        room[np.arange(devices), holds[expert]] = 1
        load[np.arange(devices), part[expert]] = loads[expert] / total
    load[:, -1] = -1
    answer = milp(
        np.eye(width)[-1],
        constraints=[
            LinearConstraint(linked, ub=0),
            LinearConstraint(whole, 1, 1),
            LinearConstraint(room, ub=per_device),
            LinearConstraint(load, ub=0),
        ],
        integrality=np.arange(width) < cells,
        bounds=Bounds(0, 1),
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    lower = 0.0 if answer.mip_dual_bound is None else float(answer.mip_dual_bound) * total
    if answer.x is None:
        return Exact(lower, np.inf, Packing(np.empty(0, np.int64), np.empty(0)))
    taken = np.where(answer.x[holds] > 0.5, answer.x[part], 0.0) * loads[:, None]
    taken *= (loads / np.maximum(taken.sum(axis=1), np.finfo(np.float64).tiny))[:, None]
    packing = _as_packing(answer.x[holds] > 0.5, taken, per_device)
    return Exact(lower, float(packing.sizes.sum(axis=1).max()), packing)


def _as_packing(holds: np.ndarray[tuple[int, int], np.dtype[np.bool_]], taken: Floats, per_device: int) -> Packing:
    """Slots from the devices' sets of experts; slots left over repeat experts and take nothing."""
    experts, devices = holds.shape
    at = np.empty((devices, per_device), np.int64)
    sizes = np.zeros((devices, per_device))
    for device in range(devices):
        mine = np.flatnonzero(holds[:, device])
        others = np.resize(np.flatnonzero(~holds[:, device]) if len(mine) < experts else mine, per_device - len(mine))
        at[device] = np.concatenate([mine, others])
        sizes[device, : len(mine)] = taken[mine, device]
    return Packing(at, sizes)
