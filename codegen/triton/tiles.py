"""Measured tiles: which form of a kernel was the fastest on a device, kept by architecture with where that is from.

`moec tune` writes the table; lowering reads it. An entry is found by the kernel's text, types and shape class, so it is
dropped by itself when the kernel changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moec.codegen.triton import cache
from moec.codegen.triton.errors import UnmetRequirement
from moec.codegen.triton.spec import Instance, Tile, with_tile
from moec.files import write_whole
from moec.targets import Target

BLOCKS = ("BM", "BN", "BK", "BH")
SIZES = ("N", "K", "HEADS")
SMALLEST, LARGEST = 16, 256
MENU = 16
"""Tiles of a menu that are measured: the best by their predicted time."""


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
    """What a tile belongs to: text, declared types, constants but for the tile's, sizes of a product, shape class.

    Types that a use has in place of the declared ones are not known yet when its tile is chosen.
    """
    from moec.codegen.triton.aot import source_of

    constants = instance.spec.constants(instance.dims)
    parts = [source_of(instance.spec.function, instance.spec.source), instance.spec.signature]
    sizes = {n: instance.dims[n] for n in SIZES if n in instance.dims and instance.spec.menu}
    text = json.dumps([*parts, constants, sizes, instance.shape, instance.arch], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load(arch: str) -> dict[str, Measured]:
    """The table of an architecture; empty when there is none that can be read."""
    try:
        entries = json.loads(table_file(arch).read_text(encoding="utf-8"))
        return {key: _entry(e) for key, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _entry(e: Mapping[str, Any]) -> Measured:
    tile = Tile(dict(e["constants"]), int(e["num_warps"]), int(e["num_stages"]), int(e["spills"]))
    return Measured(tile, float(e["microseconds"]), float(e["declared_microseconds"]), str(e["source"]))


def save(arch: str, found: Mapping[str, Measured]) -> Path:
    """Add measured tiles to the table of an architecture; returns the file. Raises NotWritten."""
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
    write_whole(file, json.dumps(entries, indent=1, sort_keys=True) + "\n")
    return file


def candidates(instance: Instance, target: Target) -> Iterator[Instance]:
    """The kernel with other tiles: the best of its menu by their predicted time, those with bulk copies also with warps
    of their own for them; without a menu other warps and stages, and one block half or twice as large."""
    seen = {instance.tile.facts}
    for other in _from_menu(instance, target) if instance.spec.menu else _beside(instance.tile):
        if other.facts not in seen:
            seen.add(other.facts)
            try:
                yield with_tile(instance, other)
            except UnmetRequirement:
                continue


def _from_menu(instance: Instance, target: Target) -> Iterator[Tile]:
    assert instance.spec.menu is not None
    for _, tile in instance.spec.menu(instance, target)[:MENU]:
        yield tile
        if tile.constants.get("TMA") and tile.num_warps == 4 and instance.arch == "sm_90a":
            yield replace(tile, constants={**tile.constants, "WS": 1})


def _beside(tile: Tile) -> Iterator[Tile]:
    blocks = [dict(tile.constants)]
    for name in BLOCKS:
        if size := tile.constants.get(name):
            blocks += [{**tile.constants, name: n} for n in (size // 2, size * 2) if SMALLEST <= n <= LARGEST]
    for constants in blocks:
        for warps in (4, 8):
            for stages in {max(1, tile.num_stages - 1), tile.num_stages, tile.num_stages + 1}:
                yield Tile(constants, warps, stages, tile.spills)
