"""Whether a rank's weights and cache fit its device, asked once the passes have decided how they are stored."""

from __future__ import annotations

from typing import ClassVar

from moec.errors import InputError
from moec.ir import CacheType, Module, TensorType
from moec.ir.cost import amount
from moec.ir.dims import bind
from moec.ir.mesh import mesh_of
from moec.passes.base import Context

PAGE = 64


class TooLittleMemory(InputError):
    """A mesh whose ranks cannot hold their part."""

    template: ClassVar[str] = (
        "a rank would hold {weights} of weights ({experts} of experts) and {cache} of cache, a device of {target} has "
        "{memory}: {advice}"
    )


def check_memory(module: Module, ctx: Context) -> None:
    """Raise TooLittleMemory when weights and cache of a rank exceed its device; ranks on a CPU share its memory."""
    mesh = mesh_of(module)
    if mesh.ranks == 1 or ctx.target.kind == "cpu":
        return
    experts, others = _weights(module)
    experts, others = experts / mesh.pp, others / mesh.pp
    pages = ctx.limits.batch * -(-ctx.limits.context // PAGE)
    kinds = {a.type for f in module.functions.values() for a in f.args if isinstance(a.type, CacheType)}
    cache = sum(bind(t.nbytes(), dict.fromkeys(t.symbols(), pages)) for t in kinds) / mesh.pp
    memory = ctx.target.device.memory_bytes
    if experts + others + cache <= memory:
        return
    room = memory - others - cache
    if room > 0 and experts:
        most = mesh.ep * experts / room
        node = ctx.target.node.devices
        ranks = -(-int(most * mesh.pp + 1) // node) * node
        advice = f"use --ranks {ranks} or more, or a smaller batch or context"
    else:
        advice = "use --tp, --pp, a smaller batch or context, or a recipe with smaller weights"
    raise TooLittleMemory(
        weights=amount(experts + others, "B"), experts=amount(experts, "B"), cache=amount(cache, "B"),
        target=ctx.target.name, memory=amount(memory, "B"), advice=advice,
    )  # fmt: skip


def _weights(module: Module) -> tuple[float, float]:
    """Bytes of a rank's experts and of its other weights, all pipeline stages together."""
    experts = others = 0.0
    for weight in module.weights.values():
        assert isinstance(weight.type, TensorType)
        nbytes = float(bind(weight.type.nbytes(), {})) * weight.points()
        if any(op.name == "weight.slot" for op in weight.program.ops):
            experts += nbytes
        else:
            others += nbytes
    return experts, others
