"""Measured tiles: which form of a kernel was the fastest on a device, kept by architecture with where that is from.

`moec tune` writes the table; lowering reads it. An entry is found by the kernel's text, types and shape class, so it is
dropped by itself when the kernel changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.codegen.triton import cache
from moec.codegen.triton.errors import UnmetRequirement
from moec.codegen.triton.spec import Instance, Tile, with_tile

BLOCKS = ("BM", "BN", "BK", "BH")
SMALLEST, LARGEST = 16, 256


@dataclass(frozen=True)
class Measured:
    """A tile and its microseconds beside the declared one's; `source`: device, driver and date."""

    tile: Tile
    microseconds: float
    declared_microseconds: float
    source: str


def table_file(arch: str) -> Path:
    """Beside the cache of compiled kernels."""
    return cache.default_folder().with_name("gpu-tiles") / f"{arch}.json"


def key_of(instance: Instance) -> str:
    """What a measured tile belongs to: text, types, constants but for the tile's, and shape class."""
    from moec.codegen.triton.aot import source_of

    constants = instance.spec.constants(instance.dims)
    parts = [source_of(instance.spec.function, instance.spec.source), instance.spec.signature, dict(instance.types)]
    text = json.dumps([*parts, constants, instance.shape, instance.arch], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load(arch: str) -> dict[str, Measured]:
    """The table of an architecture; empty when there is none that can be read."""
    try:
        entries = json.loads(table_file(arch).read_text())
        return {key: _entry(e) for key, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _entry(e: Mapping[str, Any]) -> Measured:
    tile = Tile(dict(e["constants"]), int(e["num_warps"]), int(e["num_stages"]), int(e["spills"]))
    return Measured(tile, float(e["microseconds"]), float(e["declared_microseconds"]), str(e["source"]))


def save(arch: str, found: Mapping[str, Measured]) -> Path:
    """Add measured tiles to the table of an architecture; returns the file."""
    file = table_file(arch)
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = {
        key: {
            "constants": dict(m.tile.constants), "num_warps": m.tile.num_warps, "num_stages": m.tile.num_stages,
            "spills": m.tile.spills, "microseconds": m.microseconds,
            "declared_microseconds": m.declared_microseconds, "source": m.source,
        }
        for key, m in {**load(arch), **found}.items()
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as beside:
        beside.write(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    os.replace(beside.name, file)
    return file


def candidates(instance: Instance) -> Iterator[Instance]:
    """The kernel with other warps and stages, and with one block half or twice as large."""
    tile = instance.tile
    seen = {_facts(tile)}
    blocks = [dict(tile.constants)]
    for name in BLOCKS:
        if size := tile.constants.get(name):
            blocks += [{**tile.constants, name: n} for n in (size // 2, size * 2) if SMALLEST <= n <= LARGEST]
    for constants in blocks:
        for warps in (4, 8):
            for stages in {max(1, tile.num_stages - 1), tile.num_stages, tile.num_stages + 1}:
                other = Tile(constants, warps, stages, tile.spills)
                if _facts(other) in seen:
                    continue
                seen.add(_facts(other))
                align = instance.dims.get("ALIGN", 0)
                if align and align % constants.get("BM", 1):
                    continue
                try:
                    yield with_tile(instance, other)
                except UnmetRequirement:
                    continue


def _facts(tile: Tile) -> tuple[Any, ...]:
    return (tuple(sorted(tile.constants.items())), tile.num_warps, tile.num_stages)
