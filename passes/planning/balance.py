"""How evenly the rows of a step fall on the devices of an expert group: mean over maximum, expected.

Three causes, each with a number that was measured in public:

- **Placement.** Experts are loaded unevenly, and replicas even that out only as far as the slots reach. Loads follow a
  Zipf law whose most loaded expert takes 11.9 times the mean, as measured for DeepSeek-R1 (NVIDIA TensorRT-LLM, Scaling
  expert parallelism, part 1, Table 1: (max - mean) / mean is 10.948 a slot). What is left is the lower bound of
  `moec.passes.placement` for that many slots and devices, which its search reaches to a few per mille.
- **Drift.** Loads differ from those that the placement was made for: in the same table, with load balancing, a device's
  rows scatter by 52.0 around a mean of 1024; 32 of that is counting noise, the rest 4 % of the mean.
- **Sampling.** The requests of one step are a sample: each differs from the average mix of topics, and each row
  falls on one device by chance (counting noise, 1 / sqrt(rows)).

The slowest of `n` devices lies as far above the mean as the largest of n normal variables: 2.1 standard deviations
for 32, 2.6 for 144. In the table above that makes 0.106 of a scatter of 52.0 in 1024; measured was 0.109.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.passes.planning.layout import Layout

ZIPF = 0.6
"""Exponent of the experts' loads by rank; over 256 experts the first takes 11.9 times the mean."""

DRIFT = 0.04
"""Standard deviation of a device's load over its mean that a placement made from past loads leaves."""

TOPIC = 1.1
"""The same for the load of one request on a device. From one published pair: SGLang's prefill of 4K prompts with its
own and with perfectly balanced routing, 50,302 and 59,337 tokens/s of a node (LMSYS, 2025-05-05). What it gives for
other prompt lengths, systems and models stands in `benchmarks/published_systems.py`."""


def expected_balance(layout: Layout, sequences: float, rows: float) -> float:
    """Mean over maximum of the rows of a layout's devices, in (0, 1].

    sequences: requests of the step in the whole expert group. rows: mean of a device.
    """
    if layout.ep == 1 or not layout.experts:
        return 1.0
    return sampled_balance(layout.ep, sequences, rows, DRIFT) / placement_limit(layout.experts, layout.slots, layout.ep)


def sampled_balance(devices: int, sequences: float, rows: float, drift: float = 0.0) -> float:
    """Mean over maximum where the loads are even over time, up to `drift`, but not within one step."""
    spread = math.sqrt(drift**2 + TOPIC**2 / max(sequences, 1.0) + 1 / max(rows, 1.0))
    return 1 / (1 + expected_maximum(devices) * spread)


@lru_cache(maxsize=1024)
def placement_limit(experts: int, slots: int, devices: int) -> float:
    """Maximum over mean of the device loads that a placement of Zipf loads cannot beat."""
    import numpy as np

    from moec.passes.placement.bounds import lower_bound

    loads = np.arange(1, experts + 1, dtype=np.float64)[None, :] ** -ZIPF
    return float(lower_bound(loads, devices, slots)[0] / (loads.sum() / devices))


def expected_maximum(count: int) -> float:
    """Expected largest of `count` standard normal variables (Blom's approximation); 0 for one."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0
