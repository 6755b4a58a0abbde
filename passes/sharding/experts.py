"""Expert parallelism: routed experts in slots over the ranks of `ep`, tokens dispatched to them and combined."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Function, Module, Op, Value, Weight
from moec.ir.builder import weight_ref
from moec.ir.mesh import Mesh
from moec.ir.module import Attribute, WeightRef
from moec.ir.optable import OPS, infer
from moec.passes.base import PassError
from moec.passes.sharding.edit import PASS, insert, weight_at


@dataclass(frozen=True)
class Dispatching:
    """Experts, slots in all, and the way of rows between nodes of `per_node` ranks."""

    experts: int
    slots: int
    via: str
    per_node: int


def shard_experts(module: Module, function: Function, mesh: Mesh, route: Dispatching) -> int:
    """Send the tokens of every `moe.dispatch` of a layer function to the experts' ranks; returns how many."""
    if mesh.ep == 1:
        return 0
    found = [op for op in function.ops if op.name == "moe.dispatch"]
    for op in found:
        _dispatch(module, function, op, mesh, route)
    return len(found)


def _dispatch(module: Module, function: Function, old: Op, mesh: Mesh, route: Dispatching) -> None:
    x, ids = old.operands
    _, offsets, order = old.results
    users = function.uses()
    (combine,) = [u for u in users[order] if u.name == "moe.combine"]
    (experts,) = [u for u in users[offsets] if u.name == "moe.experts"]
    router = function.producer()[ids]  # type: ignore[index]
    weights = combine.operands[2]
    if not function.args or str(function.args[0].type) != "index":
        message = f"@{function.name} dispatches tokens outside a layer function"
        raise PassError(name=PASS, message=message)
    first = _first_layer(module)
    for position in range(2, len(experts.operands)):
        weight = weight_at(module, experts, position)
        if weight is None:
            raise PassError(name=PASS, message=f"@{function.name}: operand {position} of moe.experts is no weight")
        hold_slots(weight, mesh, route, first)
        experts.operands[position] = weight_ref(weight, _indices(experts, position))
    common: dict[str, Attribute] = {
        "axis": "ep", "ranks": mesh.ep, "slots": route.slots, "rows": "D", "via": route.via, "per_node": route.per_node,
    }  # fmt: skip
    limit = node_limit(router, mesh, route)
    if limit:
        common["node_limit"] = limit
    at = function.ops.index(old)
    sent = insert(
        module, function, at, "comm.dispatch", [function.args[0], x, ids, weights],
        {**common, "experts": route.experts, "first": first},
    )  # fmt: skip
    new_rows, new_offsets, handle = sent.results
    experts.operands[:2] = [new_rows, new_offsets]
    (experts.result.type,) = infer(OPS[experts.name], experts.operands, experts.attrs, module)
    done = insert(
        module, function, function.ops.index(combine), "comm.combine", [combine.operands[0], handle, weights], common
    )
    for op in function.ops:
        op.operands = [done.result if o is combine.result else o for o in op.operands]
    function.returns = [done.result if v is combine.result else v for v in function.returns]
    done.loc = combine.loc.through(PASS) if combine.loc else None
    sent.loc = old.loc.through(PASS) if old.loc else None
    function.ops.remove(old)
    function.ops.remove(combine)


def _indices(op: Op, position: int) -> tuple[Value, ...]:
    ref = op.operands[position]
    assert isinstance(ref, WeightRef)
    return ref.indices


def _first_layer(module: Module) -> int:
    """The first layer that has experts: the placement's first row."""
    routed = {f.name for f, op in module.ops() if op.name in ("moe.dispatch", "comm.dispatch")}
    calls = [op for _, op in module.ops() if op.name == "repeat" and op.attrs["func"] in routed]
    return min((int(op.attrs["first"]) for op in calls), default=0)  # type: ignore[arg-type]


def hold_slots(weight: Weight, mesh: Mesh, route: Dispatching, first: int) -> None:
    """Make a stack of experts the stack of this rank's slots."""
    program = weight.program
    if any(op.name == "weight.slot" for op in program.ops):
        return
    if [name for name, _, _ in weight.indices] != ["l", "e"]:
        raise PassError(name=PASS, message=f"@{weight.name} is no stack of experts by layer and expert")
    each = route.slots // mesh.ep
    weight.indices = (weight.indices[0], ("e", 0, each))
    attrs: dict[str, Attribute] = {
        "axis": "ep", "ranks": mesh.ep, "slots": route.slots, "experts": route.experts, "first": first,
    }  # fmt: skip
    (type_,) = infer(OPS["weight.slot"], program.args, attrs, None)
    slot = Op("weight.slot", list(program.args), dict(attrs), [Value("slot", type_)])
    # Checkpoints that stack their experts select one by the index itself.
    for op in program.ops:
        op.operands = [slot.result if o is program.args[1] else o for o in op.operands]
    program.ops.insert(0, slot)


def node_limit(router: Op, mesh: Mesh, route: Dispatching) -> int:
    """Nodes that a token reaches at most, where whole groups of experts stand on one node each; 0 without a limit."""
    groups, chosen = int(router.attrs.get("groups", 1)), int(router.attrs.get("top_groups", 1))  # type: ignore[arg-type]
    nodes = mesh.ep // route.per_node
    bound = route.slots == route.experts and nodes > 1 and groups % nodes == 0
    return min(nodes, chosen) if bound else 0
