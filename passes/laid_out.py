"""Where a module lies: the layout that was asked for, or the one that its mesh already says."""

from __future__ import annotations

from moec.ir import Module
from moec.ir.mesh import mesh_of
from moec.passes.base import Context, Limits
from moec.passes.planning.layout import Layout, LayoutRequest, expert_count, resolve
from moec.passes.planning.precision import RECIPES, candidates
from moec.targets import Target


def layout_of(module: Module) -> Layout:
    """The layout of a module as it stands: its mesh, and the slots of its exchanges."""
    mesh = mesh_of(module)
    sent = next((op for _, op in module.ops() if op.name == "comm.dispatch"), None)
    if sent is None:
        experts = slots = expert_count(module)
    else:
        experts, slots = int(str(sent.attrs["experts"])), int(str(sent.attrs["slots"]))
    return Layout(mesh.tp, mesh.dp, mesh.ep, experts, slots, mesh.pp)


def context_of(
    module: Module, target: Target, limits: Limits, asked: LayoutRequest | None = None, recipe: str = "auto"
) -> Context:
    """What passes know of a module: one that is sharded lies as its mesh says, another as `resolve` decides.

    Raises WrongLayout, WrongRedundancy, CutBlock, WrongRanks or NoLink.
    """
    if (mesh := mesh_of(module)).ranks > 1:
        sized = resolve(module, target, RECIPES["bf16"], LayoutRequest(ranks=mesh.ranks, ep=1))[1]
        return Context(sized, limits, layout_of(module))
    # FP32 has no scale blocks that a cut could meet, as BF16.
    name = "bf16" if recipe == "fp32" else recipe
    stored = candidates(name if name in RECIPES else "auto", target)[0]
    layout, sized = resolve(module, target, stored, asked or LayoutRequest())
    return Context(sized, limits, layout)


def idle_requests(asked: LayoutRequest, layout: Layout) -> list[str]:
    """What was asked of a layout and has no effect on it, with the reason."""
    idle = []
    if asked.redundant and layout.ep == 1:
        idle.append(f"redundant experts ({asked.redundant}) have no effect: all experts lie on one rank")
    if asked.pad and layout.tp == 1:
        idle.append("padding has no effect: TP 1 cuts no width")
    return idle
