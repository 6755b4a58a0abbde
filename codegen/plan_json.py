"""plan.json: what the passes decided, for the runtime, the simulator and a reader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moec.ir import Module

if TYPE_CHECKING:
    from moec.passes.base import Context
    from moec.passes.manager import Record

ATTENTION = {"attn.mla": "plain", "attn.mla_absorbed": "absorbed"}


def plan_document(module: Module, context: Context, records: Sequence[Record]) -> dict[str, Any]:
    """The decisions as plain data; equal decisions give an equal document (no times of this run)."""
    layout = context.layout
    mesh: dict[str, int] = {}
    if layout is not None:
        mesh = {"ranks": layout.ranks, "pp": layout.pp, "dp": layout.dp, "tp": layout.tp, "ep": layout.ep}
    if layout is not None and layout.experts:
        mesh |= {"expert_slots": layout.slots, "slots_per_device": layout.slots_per_device}
    return {
        "target": context.target.name,
        "recipe": module.attrs.get("recipe", ""),
        "mesh": mesh,
        **{key: module.attrs[key] for key in ("placement", "replica_shares") if key in module.attrs},
        "forms": attention_forms(module),
        "passes": [
            {"name": r.name, "matched": r.matched, "notes": list(r.notes), "warnings": list(r.warnings)}
            for r in records
        ],
    }


def attention_forms(module: Module) -> dict[str, str]:
    """`plain` or `absorbed` for each phase that attends."""
    found: dict[str, str] = {}
    for function, op in module.ops():
        if op.name in ATTENTION:
            found.setdefault(str(function.attrs.get("phase", function.name)), ATTENTION[op.name])
    return found
