"""Precision recipes as the planner sees them: bytes of a weight, and the type that products run in."""

from __future__ import annotations

from dataclasses import dataclass

from moec.errors import near
from moec.passes.planning.errors import WrongPlan
from moec.targets import Target

BLOCK = 128
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Recipe:
    """`product`: row type of products with matrices; `head`: of the output head; `wire`: of dispatched tokens.

    Embedding, gate, norms and attention itself stay in 16 bits or more (DeepSeek-V3 technical report,
    arXiv 2412.19437, sec. 3.3.1); combine travels in BF16.
    """

    name: str
    product: str
    head: str
    wire: str

    @property
    def blocks(self) -> bool:
        """Whether matrices carry a scale for each 128x128 block."""
        return self.product == "fp8_block"

    def weight_bytes(self, rows: int, columns: int, role: str) -> float:
        """Bytes of one matrix or vector; role: matrix, head, embedding or exact (kept in 16 bits)."""
        kind = {"matrix": self.product, "head": self.head}.get(role, "bf16")
        if kind == "bf16":
            return 2.0 * rows * columns
        return rows * columns + _SCALE_BYTES * -(-rows // BLOCK) * -(-columns // BLOCK)


RECIPES = {
    r.name: r
    for r in (
        Recipe("deepseek-v3", "fp8_block", "bf16", "fp8"),
        Recipe("weight-only", "fp8_block", "fp8_block", "bf16"),
        Recipe("bf16", "bf16", "bf16", "bf16"),
    )
}


def candidates(name: str, target: Target) -> list[Recipe]:
    """The recipes to choose from: the named one, or for `auto` those that suit the target. Raises WrongPlan."""
    if name != "auto":
        if name not in RECIPES:
            raise WrongPlan(message=f"unknown recipe {name!r}{near(name, ['auto', *RECIPES])}")
        return [RECIPES[name]]
    if target.device.fp8.matrix:
        return [RECIPES["deepseek-v3"]]
    return [RECIPES["weight-only"], RECIPES["bf16"]]


def substitution(recipe: Recipe, target: Target) -> str:
    """What happens instead of FP8 products on a device without them; empty when nothing does."""
    if target.device.fp8.matrix:
        return ""
    if recipe.blocks:
        return f"{target.name} has no FP8 matrix units: weights are stored in FP8 and widened, products run in BF16"
    return f"{target.name} has no FP8 matrix units: weights and products are BF16"
