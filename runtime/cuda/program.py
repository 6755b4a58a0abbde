"""The part of plan.json that runs on a GPU: both phases as launches over one arena, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moec.ir.expr import BadExpression, evaluate
from moec.runtime.fields import Fields
from moec.runtime.manifest import Manifest
from moec.runtime.plan import MeshPlan, parse_mesh, stage_of

Sizes = Mapping[str, int]
INPUTS = {
    "ids": "T", "seq": "T", "pos": "T", "pages": "B * N", "starts": "B + 1", "rows": "R", "lengths": "B",
    "q_starts": "B + 1", "live": "2", "temperature": "R", "top_k": "R", "top_p": "R", "min_p": "R", "key": "2 * R",
    "number": "R",
}  # fmt: skip
"""What a call gives as int32, and how many. As for CPUs, and besides: `lengths`, the cached positions of every sequence
with this call's; `q_starts`, the sum of the sequences' new tokens before each; `live`, how many of the tokens, and of
this rank's part of them, are somebody's: the others only fill a batch up and are sent nowhere; and how the token after
each row is drawn (some of it float32, and 64-bit keys, by their bits)."""
SYMBOLS = ("T", "R", "B", "N", "S", "C", "U", "D", "RANK")
"""Run-time sizes: tokens, rows of logits, sequences, pages of each, cached positions of all and of the longest; of one
of several ranks its part of the tokens, the rows that a dispatch brought, and its place among those with experts."""
MOST_PARTS = 16
KNOWN = dict.fromkeys([*SYMBOLS, *(f"{s}{k}" for s in "TRBSUD" for k in range(MOST_PARTS))], 1)
"""Sizes of a call with one of each, to see whether expressions have values."""
EXCHANGES = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "rows", "send", "recv", "dispatch_rows", "combine_rows",
)  # fmt: skip
DTYPES = ("f32", "bf16", "f16", "i32", "u8")


@dataclass(frozen=True)
class GpuEntry:
    """One phase: its steps, and the most tokens, rows of logits and sequences of a call."""

    name: str
    steps: tuple[Mapping[str, Any], ...]
    max_tokens: int
    max_rows: int
    max_sequences: int
    parts: int = 1
    """Micro-batches: inputs and run-time sizes have their number behind their names, but for N, C and RANK."""

    def most(self, size: int) -> int:
        """The most of a micro-batch, of so many of the whole batch."""
        return -(-size // self.parts)


@dataclass(frozen=True)
class GpuPlan:
    """Both phases (one of them may be missing), the arena, and the paged cache."""

    entries: Mapping[str, GpuEntry]
    arena_bytes: int
    page_size: int
    pages: int
    cache: tuple[int, ...]
    cache_row_bytes: int
    mesh: MeshPlan = field(default_factory=MeshPlan)
    slots: tuple[int, int] = (0, 0)
    """Experts, and slots for them on all ranks together."""
    states: tuple[int, str] = (0, "")
    """Width and element type of the hidden states, with a module that drafts."""
    draw: Mapping[str, Any] = field(default_factory=dict)
    """The launch that draws a token from every row of logits."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the whole cache."""
        layers, pages, tokens, _ = self.cache
        return layers * pages * tokens * self.cache_row_bytes


@dataclass(frozen=True)
class DeviceView:
    """A tensor on the device: where it begins, its element type, shape over run-time sizes, elements between rows."""

    at: Mapping[str, Any]
    dtype: str
    shape: tuple[str, ...]
    ld: int


@dataclass(frozen=True)
class Exchange:
    """Communication with the ranks along `axis`; `where` is the model's line."""

    name: str
    axis: str
    attrs: Mapping[str, Any]
    inputs: tuple[DeviceView, ...]
    outputs: tuple[DeviceView, ...]
    where: str


def parse_gpu_plan(raw: bytes, file: str, manifest: Manifest, rank: int = 0) -> GpuPlan:
    """Read and check plan.json, of a pipeline the stage of `rank`, against the manifest's limits.

    Raises MalformedFile.
    """
    fields = Fields.parse(raw, file)
    mesh, whole = parse_mesh(fields), fields
    if stage := stage_of(mesh, rank):
        stages = fields.tables("stages")
        if len(stages) < stage:
            raise fields.problem("stages", f"lacks stage {stage}")
        fields = stages[stage - 1]
    cache = whole.table("cache")
    shape = tuple(d for d in cache.dims("shape") if isinstance(d, int))
    page_size = whole.integer("page_size", 1)
    slots = (0, 0)
    if "slots" in whole.data:
        found = whole.table("slots")
        slots = found.integer("experts", 1), found.integer("slots", 1)
    needed = manifest.batch * -(-manifest.context // page_size) + 1
    if len(shape) != 4 or shape[1] < needed:
        raise cache.problem("shape", f"has not the {needed} pages of {manifest.batch} full sequences and one to spare")
    states = (0, "")
    if "states" in whole.data:
        told = whole.table("states")
        states = told.integer("width", 1), told.text("dtype")
        if states[1] not in ("f32", "bf16"):
            raise told.problem("dtype", f"is {states[1]!r}, not f32 or bf16")
    draw: Mapping[str, Any] = {}
    if "draw" in whole.data:
        _check(whole.table("draw"))
        draw = whole.data["draw"]
    programs = fields.table("programs")
    entries = {name: _entry(name, programs.table(name), manifest) for name in programs.data}
    if not entries or set(entries) - {"prefill", "decode", "draft"}:
        raise fields.problem("programs", "must be prefill, decode or both, and draft with a module for it")
    if manifest.drafts and not ({"decode", "draft"} <= set(entries) and states[0]):
        raise fields.problem("programs", "lacks decode, draft or the width of states, which drafting needs")
    arena, row_bytes = fields.integer("arena_bytes", 0), cache.integer("row_bytes", 1)
    return GpuPlan(entries, arena, page_size, shape[1], shape, row_bytes, mesh, slots, states, draw)


def _entry(name: str, fields: Fields, manifest: Manifest) -> GpuEntry:
    tokens, rows = fields.integer("max_tokens", 1), fields.integer("max_rows", 1)
    sequences = fields.integer("max_sequences", 1)
    steps = tuple(step.data for step in fields.tables("steps"))
    for step in fields.tables("steps"):
        _check(step)
    least = manifest.batch * (1 + manifest.drafts)
    if name != "prefill" and min(tokens, rows, sequences) < least:
        what = f"the {least} tokens of a step" if manifest.drafts else f"the batch of {least} sequences"
        raise fields.problem("max_tokens", f"takes less than {what}")
    parts = fields.integer("parts", 1) if "parts" in fields.data else 1
    if parts > MOST_PARTS:
        raise fields.problem("parts", f"is {parts}, at most {MOST_PARTS} are known")
    return GpuEntry(name, steps, tokens, rows, sequences, parts)


def _check(step: Fields) -> None:
    """Raise MalformedFile for a step that the executor does not know or whose sizes cannot be evaluated."""
    if "repeat" in step.data:
        step.integers("repeat")
        for inner in step.tables("steps"):
            _check(inner)
        return
    if "collective" in step.data:
        parse_exchange(step)
        return
    if not {"kernel", "fill", "copy", "record", "wait"} & set(step.data):
        raise step.problem("kernel", "is missing: a launch, fill, copy, collective, record, wait or repeat is wanted")
    texts = [*step.items("grid"), step.data.get("bytes", 0)]
    arguments = step.table("arguments") if "arguments" in step.data else Fields({}, step.file)
    for name, value in arguments.data.items():
        texts += [value] if isinstance(value, str) else []
        texts += arguments.table(name).items("shape") if isinstance(value, dict) else []
    for text in texts:
        try:
            evaluate(str(text), KNOWN)
        except BadExpression as error:
            raise step.problem("arguments", f"has an {error}") from None


def parse_exchange(step: Fields) -> Exchange:
    """A step that the communicator runs; raises MalformedFile."""
    name, attrs = step.text("collective"), step.table("attrs")
    if name not in EXCHANGES:
        raise step.problem("collective", f"is {name!r}, known: {', '.join(EXCHANGES)}")
    inputs, outputs = (tuple(_view(v) for v in step.tables(key)) for key in ("inputs", "outputs"))
    return Exchange(name, attrs.text("axis"), attrs.data, inputs, outputs, step.text("where"))


def _view(fields: Fields) -> DeviceView:
    dtype, shape = fields.text("dtype"), fields.texts("shape")
    if dtype not in DTYPES:
        raise fields.problem("dtype", f"is {dtype!r}, known: {', '.join(DTYPES)}")
    try:
        for size in shape:
            evaluate(size, KNOWN)
    except BadExpression as error:
        raise fields.problem("shape", f"has an {error}") from None
    return DeviceView(fields.table("at").data, dtype, shape, fields.integer("ld", 1))


def symbols(table_width: int, tokens: int, rows: int, sequences: int, longest: int, k: str = "") -> dict[str, int]:
    """The run-time sizes of a call, or of its micro-batch `k`: `longest` is the most cached positions of a sequence."""
    own = {"T": tokens, "R": rows, "B": sequences, "S": sequences * longest}
    return {**{f"{name}{k}": size for name, size in own.items()}, "N": table_width, "C": longest}
