"""place-experts: from recorded loads to the experts of every slot, before the model is sharded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from moec.ir import Module, TensorType
from moec.ir.mesh import mesh_of
from moec.passes.base import Context, Outcome, Pass, PassError
from moec.passes.sharding.placed import routed_layers

if TYPE_CHECKING:
    from moec.passes.placement import Problem
    from moec.passes.placement.problem import Floats
    from moec.passes.placement.recordings import Recording

SHARES = ("even", "free")


@dataclass(frozen=True)
class PlaceExperts(Pass):
    """Choose replicas and slots for every layer from `loads`, tokens per expert [layers, experts].

    `loads` is a file, or several recordings of one model with ":" between them, which are added: as they are with
    `weights = tokens`, so that each counts the same with `equal`, or by factors `3:1`. Consumes a module before `shard`
    on a layout with several expert ranks; produces the module attributes `placement` (the expert in every slot, a row a
    layer) and, with `shares = free`, `replica_shares`. `slots` is the slots of a device (0: the layout's); `groups`
    binds that many groups of experts to nodes (node-limited routing); `coactivation` is a file of tokens per pair of
    experts, by which partners share nodes (default: what all recordings hold; `none`: nothing). Must not change
    results: tolerance 0.
    """

    name: ClassVar[str] = "place-experts"
    loads: str = ""
    weights: str = "tokens"
    coactivation: str = ""
    slots: int = 0
    groups: int = 1
    shares: str = "even"

    def requires(self, module: Module) -> str:
        """Placed experts decide what a rank holds: they come first."""
        return "the module is sharded already" if mesh_of(module).ranks > 1 else ""

    def ensures(self, module: Module) -> str:
        """Every expert of a layer stands in a slot, and the shares of its copies make up the whole."""
        rows: Any = module.attrs.get("placement", ())
        shares: Any = module.attrs.get("replica_shares")
        router = next((op for _, op in module.ops() if op.name == "moe.route"), None)
        if not rows or router is None:
            return ""
        assert isinstance(router.operands[1].type, TensorType)
        experts = int(str(router.operands[1].type.shape[0]))
        if uneven := next((i for i, row in enumerate(rows) if len(row) != len(rows[0])), None):
            return f"layer {uneven} of the placement has {len(rows[uneven])} slots, layer 0 {len(rows[0])}"
        return next((broken for i, row in enumerate(rows) if (broken := _broken(i, row, shares, experts))), "")

    def run(self, module: Module, ctx: Context) -> Outcome:
        from moec.passes.placement import Problem, place

        out = Outcome()
        layout = ctx.layout
        if layout is None or layout.ep == 1:
            out.warnings.append("experts lie on one rank: nothing to place")
            return out
        if not self.loads:
            raise PassError(name=self.name, message="name a file of loads: place-experts{loads=FILE}")
        if self.shares not in SHARES:
            raise PassError(name=self.name, message=f"shares must be one of {', '.join(SHARES)}, got {self.shares!r}")
        recording = self._recording(out)
        loads = recording.loads
        layers = routed_layers(module)
        if loads.shape != (layers, layout.experts):
            message = f"{recording.name} has loads of {list(loads.shape)}, the model {[layers, layout.experts]}"
            raise PassError(name=self.name, message=f"{message} (layers with experts, experts)")
        node = min(ctx.target.node.devices, layout.ep)
        problem = Problem.of(
            loads,
            devices=layout.ep,
            slots_per_device=self.slots or layout.slots_per_device,
            devices_per_node=node if layout.ep % node == 0 else None,
            groups=self.groups,
        )
        pairs = self._pairs(recording, problem, out)
        found = place(problem, shares=cast(Literal["even", "free"], self.shares), coactivation=pairs)
        placement = found.placement
        module.attrs["placement"] = tuple(tuple(map(int, row)) for row in placement.physical_to_logical_map)
        if not placement.has_even_shares:
            module.attrs["replica_shares"] = tuple(tuple(map(float, row)) for row in placement.replica_shares)
        out.matched = layers
        mean, worst = found.over_mean.mean(), found.over_mean.max()
        out.notes += [
            f"{layers} layers, {layout.experts} experts in {placement.slots} slots on {layout.ep} devices",
            f"greatest device load {mean:.4f} of the mean load ({worst:.4f} in the worst layer), at most "
            f"{found.balance.max():.4f} of the lower bound",
        ]
        if (found.over_mean > 1.1).any():
            out.notes.append("more slots a device would balance better: place-experts{slots=N}")
        return out

    def _recording(self, out: Outcome) -> Recording:
        """The recordings of all files as one; a note says what each counted for."""
        from moec.passes.placement.recordings import merge, read_recording

        # A single file may have any name.
        whole = Path(self.loads).exists()
        files = [self.loads] if whole else [name for name in self.loads.split(":") if name]
        recordings = [read_recording(Path(name)) for name in files]
        merged, factors = merge(recordings, self.weights, name="place-experts: weights", between=":")
        if len(recordings) > 1:
            out.notes += [f"loads of {r.name}, times {f:g}" for r, f in zip(recordings, factors, strict=True)]
        return merged

    def _pairs(self, recording: Recording, problem: Problem, out: Outcome) -> Floats | None:
        """Co-activation of a file, or of the recordings where all have it and there are several nodes."""
        from moec.passes.placement import formats

        if self.coactivation == "none":
            return None
        if problem.nodes == 1:
            if self.coactivation:
                out.notes.append("one node: coactivation has no effect")
            return None
        if self.coactivation:
            return formats.read_coactivation(Path(self.coactivation), problem.layers, problem.experts)
        if recording.coactivation is not None:
            out.notes.append("the recorded co-activation gathers partners on nodes (coactivation=none: balance alone)")
        return recording.coactivation


def _broken(layer: int, row: Any, shares: Any, experts: int) -> str:
    """What is wrong with the slots of a layer; empty when nothing is."""
    missing = set(range(experts)) - set(row)
    if missing:
        return f"layer {layer} of the placement has no slot for expert {min(missing)}"
    for expert in range(experts if shares else 0):
        total = sum(share for share, placed in zip(shares[layer], row, strict=True) if placed == expert)
        if abs(total - 1) > 1e-6:
            return f"layer {layer} of the placement: the shares of expert {expert} sum to {total:g}"
    return ""
