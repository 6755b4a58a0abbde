"""Counts over a module: parameters, and those that one token touches."""

from __future__ import annotations

from collections import Counter
from typing import Any

from moec.ir.mesh import mesh_of
from moec.ir.module import Module, Weight, WeightRef
from moec.ir.types import TensorType


def weight_elements(weight: Weight) -> int:
    """Elements of a weight over all its index points."""
    assert isinstance(weight.type, TensorType)
    return int(weight.type.elements()) * weight.points()  # type: ignore[arg-type]


def _is_table(weight: Weight) -> bool:
    """Whether a weight is computed rather than learned."""
    return not any(op.name.startswith("weight.load") for op in weight.program.ops)


def parameters(module: Module) -> int:
    """Learned parameters; a tensor that two weights load (a tied head) counts once."""
    seen: set[object] = set()
    total = 0
    for weight in module.weights.values():
        tensors = tuple(str(op.attrs["tensor"]) for op in weight.program.ops if op.name.startswith("weight.load"))
        source = (tensors, weight.indices)
        if not _is_table(weight) and source not in seen:
            seen.add(source)
            total += weight_elements(weight)
    return total


def active_parameters(module: Module) -> int:
    """Parameters that one token touches: of routed experts top_k, of a rank's slots at most as many.

    The embedding counts whole, as in the published counts of DeepSeek-V3 (arXiv 2412.19437).
    """
    total = parameters(module)
    seen: set[str] = set()
    for function in module.functions.values():
        top_k = 0
        for op in function.ops:
            if op.name == "moe.route":
                top_k = int(op.attrs["top_k"])  # type: ignore[arg-type]
            for operand in op.operands if op.name == "moe.experts" else ():
                if not isinstance(operand, WeightRef) or operand.name in seen:
                    continue
                seen.add(operand.name)
                weight = module.weights[operand.name]
                experts = next(stop - start for name, start, stop in weight.indices if name == "e")
                total -= weight_elements(weight) * max(0, experts - top_k) // experts
    return total


def weight_bytes(weight: Weight) -> int:
    """Bytes of a weight, its scales included, over all its index points."""
    assert isinstance(weight.type, TensorType)
    return int(weight.type.nbytes()) * weight.points()  # type: ignore[arg-type]


def bytes_by_storage(module: Module) -> dict[str, int]:
    """Bytes of weights by element type and scales, e.g. `fp8_e4m3 scale(f32, 128x128)`."""
    total: Counter[str] = Counter()
    for weight in module.weights.values():
        assert isinstance(weight.type, TensorType)
        total[f"{weight.type.dtype} {weight.type.quant or ''}".rstrip()] += weight_bytes(weight)
    return dict(total)


def statistics(module: Module) -> dict[str, Any]:
    """Counts as plain data: parameters, those a token touches, weight bytes by storage, ops by function and name.

    Of a module over several `ranks` they are those of one rank.
    """
    return {
        "module": module.name,
        "ranks": mesh_of(module).ranks,
        "parameters": parameters(module),
        "active_parameters": active_parameters(module),
        "weight_bytes": bytes_by_storage(module),
        "functions": {f.name: dict(Counter(op.name for op in f.ops)) for f in module.functions.values()},
    }
