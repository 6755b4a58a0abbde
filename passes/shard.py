"""shard: one program for every rank of a mesh, with its collectives, and weight programs of each rank's part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moec.ir import Module
from moec.ir.mesh import Mesh, mesh_of, set_mesh
from moec.ir.rewrite import fresh_names, retype
from moec.passes.base import Context, Outcome, Pass, PassError
from moec.passes.sharding.experts import Dispatching, shard_experts
from moec.passes.sharding.placed import place_experts
from moec.passes.sharding.stages import split_stages
from moec.passes.sharding.tensor import Widths, cut_head, cut_layers, heads_of_keys, narrow_cache

VIA = ("auto", "direct", "node")


@dataclass(frozen=True)
class Shard(Pass):
    """Lay a model over the mesh of the layout: pipeline stages, attention replicas, tensor parts, experts.

    Consumes a module before precision recipes, with `moe.dispatch` and `moe.combine` inside one rank. Produces the
    program of every rank: attention and dense feed-forwards cut by heads and widths over `tp` with an all-reduce behind
    each (Shoeybi et al. 2019, arXiv 1909.08053; ranks share a head of keys and values where those are fewer), the head
    by vocabulary, routed experts over `ep` between `comm.dispatch` and `comm.combine`, where tokens of one
    tensor-parallel group are divided first, layers over `pp`;
    weights whose programs make the rank's part. Shared experts are whole where experts are dispatched, else cut like
    dense ones. `via` and `per_node` choose the way between nodes (`auto`: prefill forwards inside nodes, decode does
    not). Results change by the order of sums: tolerance 0.
    """

    name: ClassVar[str] = "shard"
    via: str = "auto"
    per_node: int = 0
    placement: str = ""
    """A file that `moec place` wrote, or SGLang's form: the experts of every slot."""

    def requires(self, module: Module) -> str:
        return "the module is sharded already" if mesh_of(module).ranks > 1 else ""

    def run(self, module: Module, ctx: Context) -> Outcome:
        if self.via not in VIA:
            raise PassError(name=self.name, message=f"via must be one of {', '.join(VIA)}, got {self.via!r}")
        out = Outcome()
        layout = ctx.layout
        if layout is None or layout.ranks == 1:
            out.warnings.append("the layout has one rank: nothing to shard")
            return out
        mesh = Mesh(layout.pp, layout.dp, layout.tp, layout.ep)
        slots = layout.slots
        if self.placement:
            slots = place_experts(module, Path(self.placement), layout.experts, mesh)
            out.notes.append(f"experts placed as {self.placement} says")
        elif isinstance(placed := module.attrs.get("placement"), tuple) and isinstance(placed[0], tuple):
            slots = len(placed[0])
        per_node = self.per_node or min(ctx.target.node.devices, mesh.ep)
        if mesh.ep % per_node and per_node < mesh.ep:
            message = f"EP {mesh.ep} does not divide over nodes of {per_node}; choose per_node among its divisors"
            raise PassError(name=self.name, message=message)
        if mesh.ep > 1 and mesh.ep % mesh.tp:
            message = (
                f"EP {mesh.ep} cuts a tensor-parallel group of {mesh.tp}; choose --ep 1 or a multiple of {mesh.tp}"
            )
            raise PassError(name=self.name, message=message)
        set_mesh(module, mesh)
        widths = Widths(layout.block, layout.pad)
        heads = heads_of_keys(module)
        for function in module.functions.values():
            out.matched += cut_layers(module, function, mesh, widths, out)
        narrow_cache(module, mesh, heads)
        # Both phases share their weights: types follow once all are cut.
        retype(module)
        for function in module.functions.values():
            route = Dispatching(layout.experts, slots, self._via(function.attrs, mesh, per_node), per_node)
            out.matched += shard_experts(module, function, mesh, route)
            fresh_names(function)
        out.matched += cut_head(module, mesh, out)
        retype(module)
        out.matched += split_stages(module, mesh, out)
        out.notes[:0] = _summary(mesh, layout.experts, slots)
        if not out.matched:
            out.warnings.append("no layer that the mesh divides: every rank holds the whole model")
        return out

    def _via(self, attrs: object, mesh: Mesh, per_node: int) -> str:
        if self.via != "auto":
            return self.via
        phase = attrs.get("phase") if isinstance(attrs, dict) else None
        return "node" if phase == "prefill" and 1 < per_node < mesh.ep else "direct"


def _summary(mesh: Mesh, experts: int, slots: int) -> Sequence[str]:
    lines = [f"{mesh.ranks} ranks: PP {mesh.pp} x DP {mesh.dp} x TP {mesh.tp}, EP {mesh.ep}"]
    if experts and mesh.ep > 1:
        extra = slots - experts
        least = ", the fewest that divide" if extra == -experts % mesh.ep else ""
        copies = f" and {extra} redundant ones{least}" if extra else ""
        lines.append(f"{experts} experts{copies}: {slots // mesh.ep} slots on each of {mesh.ep} ranks")
    return lines
