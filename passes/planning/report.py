"""A plan as plain data: the fields of `moec plan --json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moec.passes.planning.advice import Alternative
from moec.passes.planning.cell import CellSchedule
from moec.passes.planning.layout import Layout
from moec.passes.planning.memory import Memory
from moec.passes.planning.plan import PhasePlan, Plan
from moec.passes.planning.search import Candidate, Found
from moec.passes.planning.training import TrainingPlan


def as_json(plan: Plan, better: Mapping[str, Sequence[Alternative]] | None = None) -> dict[str, Any]:
    """One object, with the gains of neighbouring layouts where given.

    Times in milliseconds or microseconds as named, sizes in bytes, rates in tokens/s.
    """
    phases = plan.phases
    worst = max((p.memory for p in phases.values()), key=lambda m: m.total)
    return {
        "target": plan.target.name,
        "layout": _layout(plan.layout),
        "recipe": plan.recipe.name,
        "workload": {
            "batch": plan.options.batch,
            "context": plan.options.context,
            "prompt": plan.options.prompt,
            "chunk": plan.options.chunk,
            "balance": plan.options.balance,
        },
        "forms": {name: p.choice.form for name, p in phases.items()},
        "form_times_us": {name: p.choice.times_us for name, p in phases.items()},
        "crossover_context": {name: p.choice.crossover for name, p in phases.items()},
        "memory_bytes": _memory(worst),
        "fits": not any(p.memory.missing for p in phases.values()),
        "tokens_per_s": {
            name: {"device": p.per_device, "node": p.per_node, "total": p.total} for name, p in phases.items()
        },
        "time_per_token_ms": plan.time_per_token_ms,
        "first_token_ms": plan.first_token_ms,
        "bound": {name: p.bound for name, p in phases.items()},
        "phases": {name: _phase(p) for name, p in phases.items()},
        "gain_when_doubled": plan.gains,
        "gain_of_layouts": {
            name: [{"change": a.change, "layout": _layout(a.layout), "gain": a.gain} for a in found]
            for name, found in (better or {}).items()
        },
        "ops": {name: _ops(p) for name, p in phases.items()},
        "notes": plan.notes,
        "warnings": plan.warnings,
    }


def _layout(layout: Layout) -> dict[str, int]:
    return {
        "ranks": layout.ranks,
        "tp": layout.tp,
        "dp": layout.dp,
        "ep": layout.ep,
        "pp": layout.pp,
        "redundant_experts": layout.slots - layout.experts,
        "experts_per_device": layout.slots_per_device,
    }


def search_json(found: Found, target: str, phase: str, seconds: float) -> dict[str, Any]:
    """The answer of a search: the ranking of layouts, the Pareto front, and where the layout asked for stands."""
    return {
        "target": target,
        "phase": phase,
        "seconds": seconds,
        "layouts": found.layouts,
        "evaluations": found.tried,
        "ranking": [_candidate(c) for c in found.ranking],
        "front": [_candidate(c) for c in found.front],
        "asked": None if found.asked is None else _candidate(found.asked),
        "asked_rank": found.rank,
    }


def _candidate(found: Candidate) -> dict[str, Any]:
    return {
        "layout": _layout(found.layout),
        "batch": found.batch,
        "requests": found.requests,
        "two_micro_batches": found.overlapped,
        "form": found.form,
        "time_ms": found.time_us / 1e3,
        "tokens_per_s_device": found.per_device,
        "balance": found.balance,
        "memory_bytes": _memory(found.memory),
    }


def _cell_layer(layer: CellSchedule | None) -> dict[str, Any] | None:
    """A layer of the overlapped cell: interval found, its bound, and that of the published order."""
    if layer is None:
        return None
    found = {"interval_us": layer.interval_us, "bound_us": layer.bound_us, "proven_least": layer.solution.optimal}
    return {**found, "published_order_us": layer.published_us, "order": dict(layer.order)}


def training_json(plan: TrainingPlan) -> dict[str, Any]:
    """A training step; times in seconds, sizes in bytes of one device."""
    return {
        "target": plan.target.name,
        "layout": _layout(plan.layout),
        "recipe": plan.recipe.name,
        "schedule": plan.options.schedule,
        "workload": {
            "sequence": plan.options.sequence,
            "global_batch": plan.options.global_batch,
            "micro_batch": plan.options.micro_batch,
            "micro_batches": plan.micro_batches,
            "balance": plan.balance,
        },
        "step_s": plan.step_s,
        "parts_s": {**plan.parts, "bubble": plan.bubble_s, "optimiser": plan.optimiser_s},
        "bubble_by_formula_s": plan.formula_bubble_s,
        "chunk_s": {
            "F": plan.chunk.forward,
            "B": plan.chunk.backward,
            "W": plan.chunk.weight,
            "F&B": plan.chunk.overlapped,
        },
        "cell_us": {"compute": plan.cell.compute_us, "exchanges": plan.cell.exchange_us},
        "cell_layer": _cell_layer(plan.layer),
        "send_s": plan.send_s,
        "layers_of_stages": plan.split,
        "tokens_per_step": plan.tokens,
        "tokens_per_day": plan.tokens_per_day,
        "gflops_per_token": {kind: flops / 1e9 for kind, flops in plan.flops_per_token.items()},
        "tflops": {kind: plan.tflops(kind) for kind in plan.flops_per_token},
        "mfu": {kind: plan.mfu(kind) for kind in plan.flops_per_token},
        "memory_bytes": [
            {
                "weights": m.weights,
                "gradients": m.gradients,
                "optimiser": m.optimiser,
                "activations": m.activations,
                "micro_batches": m.micro_batches,
                "total": m.total,
            }
            for m in plan.memory
        ],
        "capacity_bytes": plan.target.device.memory_bytes,
        "fits": plan.fits,
    }


def _phase(plan: PhasePlan) -> dict[str, Any]:
    return {
        "step_ms": plan.step_us / 1e3,
        "serial_ms": plan.serial_us / 1e3,
        "two_micro_batches_ms": None if plan.paired_us is None else plan.paired_us / 1e3,
        "overlapped": plan.overlapped,
        "balance": plan.balance,
        "communication_ms": plan.choice.cost.communication_us / 1e3,
        "exposed_communication_ms": plan.exposed_us / 1e3,
        "tokens": plan.tokens,
        "mfu": plan.mfu,
        "bound": plan.bound,
        "time_by_bound_ms": {name: time / 1e3 for name, time in plan.by_bound.items()},
        "memory_bytes": _memory(plan.memory),
    }


def _memory(memory: Memory) -> dict[str, float]:
    parts = {name: float(getattr(memory, name)) for name in ("weights", "kv_cache", "activations", "buffers")}
    return {**parts, "total": memory.total, "capacity": memory.capacity}


def _ops(plan: PhasePlan) -> list[dict[str, Any]]:
    return [
        {
            "op": op.op,
            "name": op.name,
            "calls": op.calls,
            "time_us": op.cost.time_us,
            "share": op.cost.time_us / plan.serial_us,
            "bound": op.cost.bound,
            "flops": op.cost.flops,
            "bytes": op.cost.bytes,
            "sent_bytes": op.cost.sent_bytes,
        }
        for op in plan.ops
    ]
