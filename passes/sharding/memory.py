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
    """Weights and cache that exceed the memory they are meant for."""

    template: ClassVar[str] = (
        "{holder} would hold {weights} of weights ({experts} of experts) and {cache} of cache, {target} has "
        "{memory}: {advice}"
    )


def memory_shortage(module: Module, ctx: Context) -> TooLittleMemory | None:
    """What is wrong when weights and cache of a rank exceed its device; ranks on a CPU share its memory."""
    mesh, on_cpu = mesh_of(module), ctx.target.kind == "cpu"
    sharers = mesh.ranks if on_cpu else 1
    experts, others, cache = (part * sharers for part in _parts(module, ctx))
    memory = ctx.target.device.memory_bytes
    if experts + others + cache <= memory:
        return None
    room = memory - others - cache
    if on_cpu:
        advice = "what does not fit is read from the disk in every step"
    elif room > 0 and experts:
        node = ctx.target.node.devices
        ranks = -(-int(mesh.ep * experts / room * mesh.pp + 1) // node) * node
        advice = f"use --ranks {ranks} or more, or a smaller batch or context"
    else:
        advice = "use --tp, --pp, a smaller batch or context, or a recipe with smaller weights"
    return TooLittleMemory(
        holder="a rank" if mesh.ranks > sharers else "the model",
        weights=amount(experts + others, "B"), experts=amount(experts, "B"), cache=amount(cache, "B"),
        target=ctx.target.name if on_cpu else f"a device of {ctx.target.name}", memory=amount(memory, "B"),
        advice=advice,
    )  # fmt: skip


def arena_shortage(module: Module, ctx: Context, arena: int) -> str:
    """What to say where only the `arena`, bytes of values between kernels, makes a GPU's memory too small; else ""."""
    experts, others, cache = _parts(module, ctx)
    memory = ctx.target.device.memory_bytes
    if not experts + others + cache <= memory < experts + others + cache + arena:
        return ""
    return (
        f"beside {amount(experts + others, 'B')} of weights and {amount(cache, 'B')} of cache, steps need "
        f"{amount(arena, 'B')} for what lies between kernels, a device of {ctx.target.name} has {amount(memory, 'B')}: "
        f"use a smaller --chunk or --batch"
    )


def _parts(module: Module, ctx: Context) -> tuple[float, float, float]:
    """Bytes of a rank's experts, of its other weights, and of its cache."""
    mesh = mesh_of(module)
    experts, others = _weights(module)
    pages = ctx.limits.batch * -(-ctx.limits.context // PAGE)
    kinds = {a.type for f in module.functions.values() for a in f.args if isinstance(a.type, CacheType)}
    cache = sum(bind(t.nbytes(), dict.fromkeys(t.symbols(), pages)) for t in kinds)
    return experts / mesh.pp, others / mesh.pp, cache / mesh.pp


def _weights(module: Module) -> tuple[float, float]:
    """Bytes of a rank's experts and of its other weights, all pipeline stages together."""
    experts = others = 0.0
    for weight in module.weights.values():
        assert isinstance(weight.type, TensorType)
        nbytes = float(bind(weight.type.nbytes(), {})) * weight.points()
        slots = any(op.name == "weight.slot" for op in weight.program.ops)
        if slots or any(name == "e" for name, _, _ in weight.indices):
            experts += nbytes
        else:
            others += nbytes
    return experts, others
