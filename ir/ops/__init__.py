"""Declarations of the ops, by theme; each puts its ops into the table when it is imported."""

from moec.ir.ops import (
    attention,
    collective,
    control,
    core,
    heads,
    indexer,
    moe,
    norms,
    quant,
    schedule,
    sharding,
    views,
    weight_sources,
    weights,
)

__all__ = [
    "attention",
    "collective",
    "control",
    "core",
    "heads",
    "indexer",
    "moe",
    "norms",
    "quant",
    "schedule",
    "sharding",
    "views",
    "weight_sources",
    "weights",
]
