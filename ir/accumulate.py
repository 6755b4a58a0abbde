"""Products summed as Hopper's FP8 tensor cores sum them, for studies of accuracy on any machine. Needs torch.

A tensor core aligns 32 products and the running sum to their largest exponent, keeps 13 fraction bits of each and adds
them (FP22: 1 sign, 8 exponent, 13 fraction bits; "Insights into DeepSeek-V3", arXiv 2505.09343, sec. 3.1). With
promotion the sum of every 128 products is added to an FP32 register and started again (DeepSeek-V3 technical report,
arXiv 2412.19437, sec. 3.3.2), as the generated GPU kernels do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FRACTION_BITS = 13
ALIGNED = 32
PROMOTED = 128
_MOST = 1 << 23
"""Products held at once."""

SIGN_AND_EXPONENT = 9
"""Bits of an accumulator, as targets state its width, that are no fraction bits."""
TARGET, EXACT, UNPROMOTED = "target", "exact", "hopper-unpromoted"
ACCUMULATE = (TARGET, EXACT, "hopper", UNPROMOTED)
ATTRIBUTE = "accumulate_bits"
"""The module's attribute with the width of its target's FP8 accumulator, where that is less than FP32's."""


def fraction_bits(mode: str, module_bits: object) -> int | None:
    """Fraction bits in which a mode of `ACCUMULATE` sums on a module's target; None for sums in the compute type."""
    if mode == EXACT or (mode == TARGET and module_bits is None):
        return None
    return int(str(module_bits)) - SIGN_AND_EXPONENT if mode == TARGET else FRACTION_BITS


def hopper_product(a: torch.Tensor, b: torch.Tensor, promote: bool, bits: int = FRACTION_BITS) -> torch.Tensor:
    """`a[M, K] · b[N, K]ᵀ` in FP32, summed with `bits` fraction bits and promoted every 128 products or not at all."""
    import torch

    rows = max(1, _MOST // (b.shape[0] * ALIGNED))
    a, b = a.double(), b.double()
    return torch.cat([_rows(a[i : i + rows], b, promote, bits) for i in range(0, a.shape[0], rows)])


def _rows(a: torch.Tensor, b: torch.Tensor, promote: bool, bits: int) -> torch.Tensor:
    import torch

    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32)
    held = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    for start in range(0, a.shape[1], ALIGNED):
        stop = min(start + ALIGNED, a.shape[1])
        products = a[:, None, start:stop] * b[None, :, start:stop]
        held = _aligned_sum(held, products, bits)
        if promote and (stop % PROMOTED == 0 or stop == a.shape[1]):
            total += held.float()
            held = torch.zeros_like(held)
    return total if promote else held.float()


def _aligned_sum(held: torch.Tensor, products: torch.Tensor, bits: int) -> torch.Tensor:
    import torch

    largest = torch.maximum(held.abs(), products.abs().amax(-1))
    unit = _unit(largest, bits)
    summed = torch.trunc(held / unit) + torch.trunc(products / unit[..., None]).sum(-1)
    value = summed * unit
    unit = _unit(value.abs(), bits)
    return torch.trunc(value / unit) * unit


def _unit(magnitude: torch.Tensor, bits: int) -> torch.Tensor:
    """The weight of the last fraction bit of numbers of that magnitude; 1 for zero."""
    import torch

    exponent = torch.frexp(magnitude).exponent - 1
    unit = torch.ldexp(torch.ones_like(magnitude), exponent - bits)
    return torch.where(magnitude > 0, unit, 1.0)
