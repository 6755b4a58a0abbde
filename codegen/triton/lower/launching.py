"""What handlers of groups share: products as launches, kernels in the element types of their operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moec.codegen.triton.arch import architecture
from moec.codegen.triton.fused.binding import Generated, pointer, tensor_of
from moec.codegen.triton.fused.groups import Group
from moec.codegen.triton.fused.products import Product, product_kernel
from moec.codegen.triton.lower.places import Base, Matrix, Place
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
    arguments = {a.name: low.bind(a) for a in made.arguments}
    if not all(mappable(arguments[name]) for name in product.boxes):
        product = replace(product, boxed=False)
        made = product_kernel(product, "kernel", group.ops, rows)
    instance = low.phase.table.generated(made, low.phase.shape, product, ROWS=low.phase.most(rows), **sizes)
    stored = int(tensor_of(product.b).elements()) // product.inner  # type: ignore[arg-type]
    for name, count in (("a_ptr", rows), ("b_ptr", stored)):
        if instance.signature[name].startswith("tensordesc"):
            arguments[name] = Matrix(arguments[name], count, product.inner)
    low.launch(instance, group, arguments, {"ROWS": rows})


def mappable(place: Place) -> bool:
    """Whether a tensor descriptor can name rows that lie there: first byte and distance are multiples of 16 bytes."""
    turn = place.base.turn if isinstance(place.base, Base) else 0
    return not (place.offset % 16 or turn % 16 or place.row * place.itemsize % 16)
