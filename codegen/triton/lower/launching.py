"""What handlers of groups share: products as launches, kernels in the element types of their operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moec.codegen.triton.arch import architecture
from moec.codegen.triton.fused.binding import Generated, pointer
from moec.codegen.triton.fused.groups import Group
from moec.codegen.triton.fused.products import Product, product_kernel
from moec.codegen.triton.spec import Instance
from moec.ir import CacheType, TensorType, Value, WeightRef

if TYPE_CHECKING:
    from moec.codegen.triton.lower.lower import Lowering


def typed(instance: Instance, kinds: Mapping[str, str] | None = None, /, **arguments: Value | WeightRef) -> Instance:
    """The kernel with the element types that its arguments have here, where the declaration has others."""
    found = {n: pointer(v.type.dtype) for n, v in arguments.items() if isinstance(v.type, TensorType | CacheType)}
    kinds = {**(kinds or {}), **found}
    other = {n: kind for n, kind in kinds.items() if instance.spec.signature[n] != kind}
    return replace(instance, types=other) if other else instance


def bound(low: Lowering, signature: Any, made: Generated) -> dict[str, Any]:
    """The arguments of a generated kernel."""
    values = {a.name: low.bind(a) for a in made.arguments}
    return {name: values[name] for name in signature}


def launch_product(low: Lowering, group: Group, product: Product, rows: str, **sizes: int) -> None:
    """A generated product."""
    if product.form == "widened" and not architecture(low.phase.table.arch).fp8:
        product = replace(product, raw=True)
    made = product_kernel(product, "kernel", group.ops, rows)
    instance = low.phase.table.generated(made, low.phase.shape, product, **sizes)
    low.launch(instance, group, bound(low, instance.signature, made), {"ROWS": rows})
