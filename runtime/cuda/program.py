"""The part of plan.json that runs on a GPU: both phases as launches over one arena, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moec.ir.expr import BadExpression, evaluate
from moec.runtime.fields import Fields
from moec.runtime.manifest import Manifest

Sizes = Mapping[str, int]
INPUTS = {
    "ids": "T", "seq": "T", "pos": "T", "pages": "B * N", "starts": "B + 1", "rows": "R", "lengths": "B",
    "q_starts": "B + 1",
}  # fmt: skip
"""What a call gives as int32, and how many. As for CPUs, and besides: `lengths`, the cached positions of every sequence
with this call's, and `q_starts`, the sum of the sequences' new tokens before each."""


@dataclass(frozen=True)
class GpuEntry:
    """One phase: its steps, and the most tokens, rows of logits and sequences of a call."""

    name: str
    steps: tuple[Mapping[str, Any], ...]
    max_tokens: int
    max_rows: int
    max_sequences: int


@dataclass(frozen=True)
class GpuPlan:
    """Both phases (one of them may be missing), the arena, and the paged cache."""

    entries: Mapping[str, GpuEntry]
    arena_bytes: int
    page_size: int
    pages: int
    cache: tuple[int, ...]
    cache_row_bytes: int

    @property
    def cache_bytes(self) -> int:
        """Bytes of the whole cache."""
        layers, pages, tokens, _ = self.cache
        return layers * pages * tokens * self.cache_row_bytes


def parse_gpu_plan(raw: bytes, file: str, manifest: Manifest) -> GpuPlan:
    """Read and check plan.json against the manifest's limits; raises MalformedFile."""
    fields = Fields.parse(raw, file)
    cache = fields.table("cache")
    shape = tuple(d for d in cache.dims("shape") if isinstance(d, int))
    page_size = fields.integer("page_size", 1)
    needed = manifest.batch * -(-manifest.context // page_size) + 1
    if len(shape) != 4 or shape[1] < needed:
        raise cache.problem("shape", f"has not the {needed} pages of {manifest.batch} full sequences and one to spare")
    programs = fields.table("programs")
    entries = {name: _entry(name, programs.table(name), manifest) for name in programs.data}
    if not entries or set(entries) - {"prefill", "decode"}:
        raise fields.problem("programs", "must be prefill, decode or both")
    return GpuPlan(entries, fields.integer("arena_bytes", 0), page_size, shape[1], shape, cache.integer("row_bytes", 1))


def _entry(name: str, fields: Fields, manifest: Manifest) -> GpuEntry:
    tokens, rows = fields.integer("max_tokens", 1), fields.integer("max_rows", 1)
    sequences = fields.integer("max_sequences", 1)
    steps = tuple(step.data for step in fields.tables("steps"))
    for step in fields.tables("steps"):
        _check(step)
    if name == "decode" and min(tokens, rows, sequences) < manifest.batch:
        raise fields.problem("max_tokens", f"takes less than the batch of {manifest.batch} sequences")
    return GpuEntry(name, steps, tokens, rows, sequences)


def _check(step: Fields) -> None:
    """Raise MalformedFile for a step that the executor does not know or whose sizes cannot be evaluated."""
    sizes = dict.fromkeys("TRBNSC", 1)
    if "repeat" in step.data:
        step.integers("repeat")
        for inner in step.tables("steps"):
            _check(inner)
        return
    if not {"kernel", "fill", "copy", "record", "wait"} & set(step.data):
        raise step.problem("kernel", "is missing: a launch, fill, copy, record, wait or repeat is wanted")
    texts = [*step.data.get("grid", ()), step.data.get("bytes", 0)]
    texts += [v for v in step.data.get("arguments", {}).values() if isinstance(v, str)]
    for text in texts:
        try:
            evaluate(str(text), sizes)
        except BadExpression as error:
            raise step.problem("arguments", f"has an {error}") from None


def symbols(plan: GpuPlan, table_width: int, tokens: int, rows: int, sequences: int, longest: int) -> dict[str, int]:
    """The run-time sizes of a call: `longest` is the most cached positions of one of its sequences."""
    return {"T": tokens, "R": rows, "B": sequences, "N": table_width, "S": sequences * longest, "C": longest}
