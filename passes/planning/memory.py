"""Bytes on one device: weights as the recipe stores them, cache, activations, exchange buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moec.ir import CacheType, Function, Module, TensorType, Value, WeightRef
from moec.ir.optable import operand_type
from moec.ir.types import BITS
from moec.passes.fp8_cast import weight_roles
from moec.passes.planning.layout import Layout
from moec.passes.planning.precision import BLOCK, Recipe
from moec.passes.planning.rows import Step, bound_type
from moec.passes.planning.sharding import sharded_weights
from moec.passes.planning.timing import Setting, functions_of, routed_to

_VIEWS = ("split", "flatten", "unflatten")


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device. Activations and buffers are estimates, the rest is exact."""

    weights: float
    kv_cache: float
    activations: float
    buffers: float
    capacity: float

    @property
    def total(self) -> float:
        """All that must be there at once."""
        return self.weights + self.kv_cache + self.activations + self.buffers

    @property
    def missing(self) -> float:
        """Bytes beyond the capacity; 0 when the model fits."""
        return max(0.0, self.total - self.capacity)


def weight_bytes(module: Module, layout: Layout, recipe: Recipe, split: Sequence[int] = ()) -> float:
    """Bytes of the weights of one device; with `split`, the layers of each pipeline stage, of the fullest stage.

    A head that shares the embedding's tensor counts once where both are on one device, in its wider form.
    """
    return max(stage_bytes(module, layout, recipe, split))


def stage_bytes(
    module: Module, layout: Layout, recipe: Recipe, split: Sequence[int] = (), tables: bool = True
) -> list[float]:
    """Bytes of the weights of a device of each stage: the embedding in the first, head and norm in the last.

    `tables`: with what is computed rather than learned.
    """
    roles, cut = weight_roles(module), {c.name: c.parts(layout.tp) for c in sharded_weights(module)}
    heads = set(_head_weights(module))
    outside: dict[object, tuple[str, float]] = {}
    layers: dict[int, float] = {}
    computed = 0.0
    for weight in module.weights.values():
        if any(op.name == "weight.rope_table" for op in weight.program.ops):
            computed += tables * float(_elements(weight.type) * BITS[_dtype(weight.type)] / 8)
            continue
        assert isinstance(weight.type, TensorType)
        role = "head" if weight.name in heads else roles.get(weight.name, "matrix")
        rows, columns = ([1, *weight.type.shape])[-2:]
        size = recipe.weight_bytes(int(rows), int(columns), role)  # type: ignore[arg-type]
        ranges = {name: (start, stop) for name, start, stop in weight.indices}
        if "e" in ranges:
            size *= layout.slots_per_device
        size /= cut.get(weight.name, 1)
        if "l" in ranges:
            for layer in range(*ranges["l"]):
                layers[layer] = layers.get(layer, 0.0) + size
            continue
        tensors = tuple(str(op.attrs["tensor"]) for op in weight.program.ops if op.name.startswith("weight.load"))
        key = tensors if len(split) < 2 else weight.name
        if size > outside.get(key, ("", 0.0))[1]:
            outside[key] = ("first" if role == "embedding" else "last", size)
    found, start = [], 0
    for count in split or [len(layers)]:
        found.append(computed + sum(layers[layer] for layer in range(start, start + count)))
        start += count
    found[0] += sum(size for place, size in outside.values() if place == "first")
    found[-1] += sum(size for place, size in outside.values() if place == "last")
    return found


def _head_weights(module: Module) -> Iterator[str]:
    for _, op in module.ops():
        if op.name == "linear" and op.attrs.get("out") == "f32" and isinstance(op.operands[1], WeightRef):
            yield op.operands[1].name


def cache_bytes(module: Module, sequences: int, context: int) -> float:
    """Bytes of the latent cache of `sequences` with `context` tokens each, in whole pages; every device has all."""
    kv = next(a.type for f in module.functions.values() for a in f.args if isinstance(a.type, CacheType))
    page = int(kv.shape[2])  # type: ignore[arg-type]
    bound = bound_type(kv, {"P": sequences * -(-context // page)})
    assert isinstance(bound, CacheType)
    return float(int(bound.nbytes()))  # type: ignore[arg-type]


def activation_bytes(module: Module, step: Step) -> float:
    """The largest sum of values alive at once over the phase's functions; from above where TP divides some of them."""
    return max(_peak(function, step.symbols) for function, _ in functions_of(module, step.phase))


def _peak(function: Function, symbols: dict[str, int]) -> float:
    owner: dict[Value, Value] = {}
    last: dict[Value, int] = {}
    for index, op in enumerate(function.ops):
        for value in op.values():
            last[owner.get(value, value)] = index
        if op.name in _VIEWS and isinstance(op.operands[0], Value):
            source = op.operands[0]
            owner |= {r: owner.get(source, source) for r in op.results}
    for value in function.returns:
        last[owner.get(value, value)] = len(function.ops)
    alive = {a: _bytes(a, symbols) for a in function.args if a in last}
    peak = sum(alive.values())
    for index, op in enumerate(function.ops):
        if op.name not in _VIEWS:
            alive |= {r: _bytes(r, symbols) for r in op.results}
        peak = max(peak, sum(alive.values()))
        alive = {v: size for v, size in alive.items() if last.get(v, -1) > index}
    return peak


def _bytes(value: Value, symbols: dict[str, int]) -> float:
    t = value.type
    # Tables of positions are weights.
    if not isinstance(t, TensorType) or (t.dtype == "f32" and not t.symbols()):
        return 0.0
    bound = bound_type(t, symbols)
    assert isinstance(bound, TensorType)
    return float(int(bound.nbytes()))  # type: ignore[arg-type]


def saved_bytes(module: Module, step: Step, setting: Setting) -> list[float]:
    """Bytes of one micro-batch that each layer keeps for its backward, in order.

    The residual stream in 16 bits; the operands of products in the products' type, once each, but those of attention
    (computed again from the latents); of experts the rows that arrived and what goes into the activation. The
    activation's operand is kept in 8 bits where products are FP8 (arXiv 2412.19437, sec. 3.3.3).
    """
    width = 1 + 4 / BLOCK if setting.recipe.blocks and setting.target.device.fp8.matrix else 2
    found = []
    for function, calls in list(functions_of(module, step.phase))[1:]:
        kept: dict[Value, float] = {}
        experts = 0.0
        for op in function.ops:
            source = op.operands[0] if op.operands else None
            if op.name in ("linear", "swiglu") and isinstance(source, Value):
                kept[source] = _count(source, step.symbols) * width
            if op.name == "moe.experts":
                _, hidden, inter = (int(d) for d in operand_type(op.operands[3]).shape)  # type: ignore[union-attr,arg-type]
                rows = step.tokens / setting.layout.tp * routed_to(module)
                experts += rows * (hidden + 2 * inter) * width
        residual = _count(function.returns[0], step.symbols) * 2 if function.returns else 0.0
        found += [sum(kept.values()) + experts + residual] * calls
    return found


def _count(value: Value, symbols: dict[str, int]) -> float:
    bound = bound_type(value.type, symbols)
    return float(_elements(bound))


def buffer_bytes(layout: Layout, step: Step, hidden: int, nodes: int) -> float:
    """Room for exchanges: the low-latency mode reserves a slot for each token of each rank at each hosted expert
    (as DeepEP does), twice; the normal mode holds what is sent and what arrives, one copy a node."""
    if layout.ep == 1:
        return 0.0
    tokens = -(-step.tokens // layout.tp)
    if step.phase == "decode":
        return 2.0 * layout.slots_per_device * layout.ep * tokens * hidden * 2
    return 2.0 * tokens * hidden * 2 * nodes


def _elements(t: object) -> int:
    assert isinstance(t, TensorType)
    return int(t.elements())  # type: ignore[arg-type]


def _dtype(t: object) -> str:
    assert isinstance(t, TensorType)
    return t.dtype
