"""A plan as plain data: the fields of `moec plan --json`."""

from __future__ import annotations

from typing import Any

from moec.passes.planning.memory import Memory
from moec.passes.planning.plan import PhasePlan, Plan


def as_json(plan: Plan) -> dict[str, Any]:
    """One object; times in milliseconds or microseconds as named, sizes in bytes, rates in tokens/s."""
    phases = plan.phases
    worst = max((p.memory for p in phases.values()), key=lambda m: m.total)
    return {
        "target": plan.target.name,
        "layout": {
            "ranks": plan.layout.ranks,
            "tp": plan.layout.tp,
            "dp": plan.layout.dp,
            "ep": plan.layout.ep,
            "pp": plan.layout.pp,
            "redundant_experts": plan.layout.slots - plan.layout.experts,
            "experts_per_device": plan.layout.slots_per_device,
        },
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
        "ops": {name: _ops(p) for name, p in phases.items()},
        "notes": plan.notes,
        "warnings": plan.warnings,
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
