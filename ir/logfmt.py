"""LogFMT: logarithmic codes with a range for each tile of 128 ("Insights into DeepSeek-V3", arXiv 2505.09343).

A value is a sign and a code of n - 1 bits; code 0 is zero, the others lie evenly between the smallest and the largest
logarithm of the tile. The smallest is raised so that the range stays within 2^32, and a value takes the code that is
nearest in linear space. Needs torch.
"""

from __future__ import annotations

import math

import torch

BITS = 10
RANGE = 32 * math.log(2)


def round_logfmt(tiles: torch.Tensor, bits: int = BITS) -> torch.Tensor:
    """`tiles[..., tile]` as the format holds them."""
    x = tiles.double()
    size = x.abs()
    some = size > 0
    logs = torch.where(some, size.log(), -torch.inf)
    high = logs.amax(-1, keepdim=True)
    low = torch.where(some, logs, torch.inf).amin(-1, keepdim=True)
    low = torch.maximum(low, high - RANGE)
    step = (high - low) / (2 ** (bits - 1) - 2)
    finite = torch.isfinite(high)
    low, step = torch.where(finite, low, 0.0), torch.where(finite, step, 0.0)
    place = torch.where(step > 0, (logs.clamp_min(-1e4) - low) / step.clamp_min(1e-300), 0.0)
    below = place.floor().clamp(0, 2 ** (bits - 1) - 2)
    lower = (low + below * step).exp()
    upper = (low + (below + 1).clamp(max=2 ** (bits - 1) - 2) * step).exp()
    value = torch.where(size - lower <= upper - size, lower, upper)
    # The smallest code also stands for what lies below it, down to half of it; the rest is zero.
    value = torch.where(some & (size >= lower / 2), value, 0.0)
    return (value.copysign(x)).to(tiles.dtype)
