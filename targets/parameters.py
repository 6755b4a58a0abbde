"""The cost model's parameters: meaning, unit and range of each. Values stand in the target files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class ParameterField:
    """One calibrated number; `low` and `high` (base units) also bound the fit."""

    path: str
    dimension: str
    low: float
    high: float
    doc: str


def _family(name: str, *rows: tuple[str, str, float, float, str]) -> tuple[ParameterField, ...]:
    return tuple(
        ParameterField(f"calibration.{name}.{key}", dimension, low, high, doc)
        for key, dimension, low, high, doc in rows
    )


_GEMM: Final = (
    ("floor", "time", 0, 1e-3, "time of the smallest product, launch included"),
    ("step", "time", 0, 1e-5, "overhead of one step of 128 bytes along k (barrier, promotion to FP32)"),
    ("compute", "ratio", 0.05, 1, "achieved share of the matrix rate inside a step"),
    ("memory", "ratio", 0.05, 1, "achieved share of the memory bandwidth"),
    ("store", "bandwidth", 1e8, 1e13, "rate at which one core writes its output tile"),
    ("norm", "ratio", 1, 8, "exponent of the soft maximum of compute and memory time"),
    ("sustained", "ratio", 0.3, 1, "share of that rate that the power limit leaves to long products"),
)

PARAMETERS: Final[dict[str, ParameterField]] = {
    p.path: p
    for p in (
        *_family("tile", ("rows", "count", 1, 256, "rows of the smallest tile of the matrix units")),
        *_family(
            "power",
            ("after", "time", 1e-5, 1, "time at full rate after which half of the loss of clock shows"),
            (
                "sustained",
                "ratio",
                0.3,
                1,
                "share of the clock that the power limit leaves to matrix units always busy",
            ),
        ),
        *_family("memory", ("achieved", "ratio", 0.3, 1, "share of the memory bandwidth that long reads achieve")),
        *_family(
            "gemm_bf16",
            *_GEMM,
            ("split", "time", 0, 1e-4, "adding up the parts when k is split over cores"),
        ),
        *_family(
            "gemm_fp8",
            *_GEMM,
            ("wide", "ratio", 1, 8, "slowdown of a single wave of the widest tiles (registers spill)"),
        ),
        *_family(
            "quantise",
            ("floor", "time", 0, 1e-3, "time of the smallest quantisation"),
            ("memory", "ratio", 0.02, 1, "achieved share of the memory bandwidth"),
        ),
        *_family(
            "stream",
            ("floor", "time", 0, 1e-3, "time of the smallest memory-bound kernel (norm, router, activation)"),
            ("memory", "ratio", 0.05, 1, "achieved share of the memory bandwidth"),
        ),
        *_family(
            "mla_decode",
            ("floor", "time", 0, 1e-3, "time of the smallest call"),
            ("combine", "time", 0, 1e-3, "second kernel that adds up the parts of a split context"),
            ("tile", "time", 0, 1e-3, "start and end of one tile of heads"),
            ("compute", "ratio", 0.05, 1, "achieved share of the matrix rate"),
            ("ramp", "time", 1e-9, 1e-4, "what long calls lose while their loads come up to that rate and run out"),
            ("norm", "ratio", 4, 8, "exponent of the soft maximum of compute and memory time"),
            ("cast_floor", "time", 0, 1e-3, "smallest cast of an FP8 cache to BF16"),
            ("cast", "ratio", 0.02, 1, "achieved share of the memory bandwidth in that cast"),
        ),
        *_family(
            "mla_prefill",
            ("floor", "time", 0, 1e-3, "time of the smallest call"),
            ("block", "count", 0, 4096, "tokens that a causal tile computes beyond its diagonal"),
            ("compute", "ratio", 0.05, 1, "achieved share of the matrix rate"),
            ("memory", "ratio", 0.05, 1, "achieved share of the memory bandwidth"),
            ("norm", "ratio", 1, 8, "exponent of the soft maximum of compute and memory time"),
        ),
        *_family(
            "experts",
            ("floor", "time", 0, 1e-3, "launches around the two grouped products and the activation"),
            ("expert", "time", 0, 1e-4, "per expert on the device, busy or not: its row count, its empty tiles"),
            ("memory", "ratio", 0.05, 1, "achieved share of the memory bandwidth in the activation"),
        ),
        *_family(
            "low_latency",
            ("dispatch_floor", "time", 0, 1e-3, "dispatch of one token, within a node"),
            ("combine_floor", "time", 0, 1e-3, "combine of one token, within a node"),
            ("expert", "time", 0, 1e-5, "per expert: its counter and its flag"),
            ("dispatch_hop", "time", 0, 1e-3, "added once when ranks are on other nodes, dispatch"),
            ("combine_hop", "time", 0, 1e-3, "added once when ranks are on other nodes, combine"),
            ("peer", "time", 0, 1e-5, "per rank on another node: its queue pair and its count"),
            ("dispatch_token", "time", 0, 1e-4, "one core handling one token: cast and issue"),
            ("combine_token", "time", 0, 1e-4, "one core handling one token: fetch and add"),
            ("scale_up", "ratio", 0.05, 1, "achieved share of the scale-up bandwidth"),
            ("scale_out", "ratio", 0.05, 1, "achieved share of the scale-out bandwidth"),
            ("norm", "ratio", 1, 8, "exponent of the soft maximum of the parts"),
        ),
        *_family(
            "normal",
            ("floor", "time", 0, 1e-2, "layout exchange and launch of the high-throughput kernels"),
            ("scale_up", "ratio", 0.05, 1, "achieved share of the scale-up bandwidth"),
            ("scale_out", "ratio", 0.05, 1, "achieved share of the scale-out bandwidth"),
            ("sms", "count", 1, 1000, "cores that the kernels occupy"),
        ),
        *_family(
            "collective",
            ("floor", "time", 0, 1e-2, "launch and handshake"),
            ("scale_up", "ratio", 0.05, 1, "achieved share of the scale-up bandwidth"),
            ("scale_out", "ratio", 0.05, 1, "achieved share of the scale-out bandwidth"),
            ("sms", "count", 1, 1000, "cores that the kernels occupy"),
        ),
    )
}
"""Path in the file -> what it means."""
