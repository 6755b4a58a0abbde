"""A placement from a file, as attributes of the module."""

from __future__ import annotations

from pathlib import Path

from moec.ir import Module
from moec.ir.mesh import Mesh
from moec.passes.base import PassError
from moec.passes.sharding.edit import PASS


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
