"""The pattern of multi-head latent attention: keys and values that one weight projects from a latent."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from moec.frontend.torch_import.exported import shape
from moec.frontend.torch_import.patterns import Attention, joined, op, part, same, unview
from moec.frontend.torch_import.rotary import Turned, rope


@dataclass(frozen=True)
class Latent:
    """`up` [h·(nope + v), rank] projects the latent; the rotary key of all heads stands behind each head's own part."""

    latent: Node
    up: Node
    key: Turned
    nope: int
    v: int

    @property
    def rank(self) -> int:
        """Width of the latent."""
        return int(shape(self.up)[1])


def latent(found: Attention) -> Latent | None:
    """The latent behind an attention's keys and values, where they have one."""
    both = joined(found.k)
    if len(both) != 2:
        return None
    own, shared = both
    while op(shared).startswith("expand"):
        shared = same(shared.args[0])
    split, key = part(own, 0), rope(shared)
    if split is None or key is None or part(found.v, 1) is not split:
        return None
    product = unview(split.args[0])
    if not op(product).startswith("linear") or (len(product.args) > 2 and product.args[2] is not None):
        return None
    nope, v = int(shape(own)[-1]), int(shape(found.v)[-1])
    return Latent(unview(product.args[0]), same(product.args[1]), key, nope, v)
