"""Placements and modules: from a file into attributes of the module, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moec.ir import Module
from moec.ir.mesh import Mesh
from moec.ir.replicas import default_slots
from moec.passes.base import PassError
from moec.passes.sharding.edit import PASS

if TYPE_CHECKING:
    from moec.passes.placement import Placement


def place_experts(module: Module, path: Path, experts: int, mesh: Mesh) -> int:
    """Set `placement` and `replica_shares` from a file; returns the slots.

    Raises PassError when it is for another model or mesh, and what reading it raises.
    """
    from moec.passes.placement.formats import read_placement

    if mesh.ep == 1:
        raise PassError(name=PASS, message=f"{path.name}: experts are on one rank each, nothing is placed; choose --ep")
    found = read_placement(path, devices=mesh.ep, experts=experts)
    layers = routed_layers(module)
    if (found.experts, found.devices) != (experts, mesh.ep):
        message = f"{path.name} places {found.experts} experts on {found.devices} devices, not {experts} on {mesh.ep}"
        raise PassError(name=PASS, message=message)
    if found.layers != layers:
        raise PassError(name=PASS, message=f"{path.name} has {found.layers} layers, the model {layers} with experts")
    module.attrs["placement"] = tuple(tuple(map(int, row)) for row in found.physical_to_logical_map)
    if not found.has_even_shares:
        module.attrs["replica_shares"] = tuple(tuple(map(float, row)) for row in found.replica_shares)
    return found.slots


def placement_of(module: Module) -> tuple[Placement, int] | None:
    """The placement that a sharded module runs by and the number of layers before it; None without dispatches."""
    from moec.passes.placement import Placement
    from moec.passes.placement.placement import normalised_shares

    sent = next((op for _, op in module.ops() if op.name == "comm.dispatch"), None)
    if sent is None:
        return None
    experts, slots, ranks, per_node, first = (
        int(sent.attrs[name])  # type: ignore[arg-type]
        for name in ("experts", "slots", "ranks", "per_node", "first")
    )
    rows = module.attrs.get("placement") or (tuple(default_slots(experts, slots)),) * routed_layers(module)
    mapping = np.array(rows, dtype=np.int64)
    given = module.attrs.get("replica_shares")
    weight = np.array(given, dtype=np.float64) if given else np.ones(mapping.shape)
    shares = normalised_shares(mapping, weight, experts)
    return Placement(mapping, shares, experts, ranks, ranks // per_node), first


def routed_layers(module: Module) -> int:
    """Layers from the first with experts to the last: rows of a placement."""
    routed = {f.name for f, op in module.ops() if op.name in ("moe.dispatch", "comm.dispatch")}
    calls = {
        (op.attrs["first"], op.attrs["last"])
        for _, op in module.ops()
        if op.name == "repeat" and op.attrs["func"] in routed
    }
    bounds = [(a, b) for a, b in calls if isinstance(a, int) and isinstance(b, int)]
    return max(b for _, b in bounds) - min(a for a, _ in bounds) + 1 if bounds else 0
