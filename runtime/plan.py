"""The part of `plan.json` that execution needs: the entry points and their arguments, in call order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

import numpy as np

from moec.runtime.fields import Fields
from moec.runtime.manifest import Manifest
from moec.runtime.steps import Step, Turn, parse_steps, parse_turns

Kind = Literal["input", "weight", "cache", "workspace", "output"]
SYMBOLS: Final = ("T", "R", "B", "B+1", "N")
INPUTS: Final[dict[str, tuple[int | str, ...]]] = {
    "ids": ("T",),
    "seq": ("T",),
    "pos": ("T",),
    "pages": ("B", "N"),
    "starts": ("B+1",),
    "rows": ("R",),
    "step": (3,),
    "hidden": ("T", "H"),
}
"""Shapes of the inputs; the width H of hidden states is the model's."""


@dataclass(frozen=True)
class Argument:
    """One tensor of a call. `shape` holds sizes and symbols: T tokens, R rows, B sequences, N pages each."""

    name: str
    kind: Kind
    dtype: np.dtype[np.generic]
    shape: tuple[int | str, ...]

    def sizes(self, symbols: dict[str, int]) -> tuple[int, ...]:
        """The shape with the symbols' values in it."""
        return tuple(symbols[d] if isinstance(d, str) else d for d in self.shape)


@dataclass(frozen=True)
class Routing:
    """What the output `routed` of an entry holds: the layer of each router, the experts that it chooses from.

    `rows` is T where a call routes all its tokens, U where ranks of a tensor-parallel group divide them.
    """

    layers: tuple[int, ...]
    experts: int
    rows: str


@dataclass(frozen=True)
class Entry:
    """An exported function of the kernel library: at most `max_tokens` tokens and `max_rows` rows of logits a call."""

    symbol: str
    max_tokens: int
    max_rows: int
    args: tuple[Argument, ...]
    steps: tuple[Step, ...] = ()
    """What a rank of several runs in place of one function: segments, collectives, loops over layers."""
    turns: tuple[Turn, ...] = ()
    """With a schedule: the same steps as micro-batches take them in turns."""
    parts: int = 1
    """Micro-batches of the turns."""
    routing: Routing | None = None


@dataclass(frozen=True)
class MeshPlan:
    """Degrees of parallelism, and per layer with experts the expert (and share of its tokens) of every slot."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    ep: int = 1
    placement: tuple[tuple[int, ...], ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()

    @property
    def ranks(self) -> int:
        """Processes that run the artifact."""
        return self.pp * self.dp * self.tp


@dataclass(frozen=True)
class Plan:
    """The entries, and the paged cache: `pages` pages of `page_size` tokens each."""

    prefill: Entry
    decode: Entry
    page_size: int
    pages: int
    mesh: MeshPlan = MeshPlan()
    draft: Entry | None = None
    """The multi-token-prediction module; prefill and decode give their hidden states then."""


def parse_plan(raw: bytes, file: str, manifest: Manifest, rank: int = 0) -> Plan:
    """Read and check `plan.json`, of a pipeline the stage of `rank`, against the manifest's limits.

    Raises MalformedFile.
    """
    fields = Fields.parse(raw, file)
    mesh = parse_mesh(fields)
    stage = stage_of(mesh, rank)
    if stage:
        stages = fields.tables("stages")
        if len(stages) < stage:
            raise fields.problem("stages", f"lacks stage {stage}")
        fields = stages[stage - 1]
    entries = fields.table("entries")
    cache = fields.table("cache").dims("shape")
    page_size = fields.integer("page_size", 1)
    needed = manifest.batch * -(-manifest.context // page_size)
    if len(cache) < 2 or not isinstance(cache[1], int) or cache[1] < needed:
        raise fields.problem("cache.shape", f"has not the {needed} pages of {manifest.batch} full sequences")
    decode = _entry(entries.table("decode"))
    step = manifest.batch * (1 + manifest.drafts)
    if decode.max_tokens < step or decode.max_rows < step:
        raise fields.problem("entries.decode", f"takes less than the {step} tokens of a step of all sequences")
    prefill, draft = _entry(entries.table("prefill")), None
    if manifest.drafts:
        draft = _entry(entries.table("draft"))
        needed = max(step, min(manifest.chunk, prefill.max_tokens))
        if draft.max_tokens < needed or draft.max_rows < needed:
            raise fields.problem("entries.draft", f"takes less than the {needed} tokens of a chunk or of a step")
        for name, entry in (("prefill", prefill), ("decode", decode), ("draft", draft)):
            if not any(a.name == "states" and len(a.shape) == 2 for a in entry.args):
                raise fields.problem(f"entries.{name}", "gives no hidden states")
    return Plan(prefill, decode, page_size, cache[1], mesh, draft)


def stage_of(mesh: MeshPlan, rank: int) -> int:
    """The pipeline stage of a rank."""
    return rank // (mesh.dp * mesh.tp)


def parse_mesh(fields: Fields) -> MeshPlan:
    """Degrees of parallelism and placement, where plan.json has them; raises MalformedFile."""
    given = fields.table("mesh") if "mesh" in fields.data else Fields({}, fields.file, "mesh")
    sizes = {a: given.integer(a, 1) if a in given.data else 1 for a in ("pp", "dp", "tp", "ep")}
    placement, shares = fields.rows("placement"), fields.rows("replica_shares")
    if not all(type(e) is int and e >= 0 for row in placement for e in row):
        raise fields.problem("placement", "must list the experts of every slot, layer by layer")
    if not all(isinstance(s, int | float) for row in shares for s in row):
        raise fields.problem("replica_shares", "must list a share for every slot, layer by layer")
    return MeshPlan(**sizes, placement=tuple(map(tuple, placement)), shares=tuple(map(tuple, shares)))


def parse_entry(described: dict[str, Any]) -> Entry:
    """An entry as the compiler describes it; raises MalformedFile."""
    return _entry(Fields.parse(json.dumps(described).encode(), "entry"))


def _entry(fields: Fields) -> Entry:
    args = tuple(_argument(arg) for arg in fields.tables("args"))
    if not any(arg.kind == "output" and arg.name == "logits" for arg in args):
        raise fields.problem("args", "has no output logits")
    sizes = (fields.integer("max_tokens", 1), fields.integer("max_rows", 1))
    steps = parse_steps(fields.tables("steps")) if "steps" in fields.data else ()
    routing = _routing(fields.table("routing"), args) if "routing" in fields.data else None
    parts = fields.integer("parts", 1) if "parts" in fields.data else 1
    turns = parse_turns(fields, steps, parts) if "turns" in fields.data else ()
    return Entry(fields.text("symbol"), *sizes, args, steps, turns, parts, routing)


def _routing(fields: Fields, args: tuple[Argument, ...]) -> Routing:
    layers, experts, rows = fields.dims("layers"), fields.integer("experts", 1), fields.text("rows")
    numbers = tuple(n for n in layers if isinstance(n, int))
    outputs = [arg.shape for arg in args if arg.name == "routed" and arg.kind == "output"]
    if len(numbers) != len(layers) or not outputs or outputs[0][0] != len(layers) or rows not in ("T", "U"):
        raise fields.problem("layers", "does not describe the output routed")
    return Routing(numbers, experts, rows)


def _argument(fields: Fields) -> Argument:
    name, kind, shape = fields.text("name"), fields.text("kind"), fields.dims("shape")
    if kind not in get_args(Kind):
        raise fields.problem("kind", f"is {kind!r}, known: {', '.join(get_args(Kind))}")
    if kind == "input" and name not in INPUTS:
        raise fields.problem("name", f"is {name!r}, known inputs: {', '.join(INPUTS)}")
    if kind == "input" and name == "hidden":
        if len(shape) != 2 or shape[0] != "T" or not isinstance(shape[1], int):
            raise fields.problem("shape", "of the hidden states must be T rows of a width")
    elif kind == "input":
        shape = INPUTS[name]
    if kind in ("weight", "cache", "workspace") and not all(isinstance(d, int) for d in shape):
        raise fields.problem("shape", f"of a {kind} must be numbers")
    for dim in shape:
        if isinstance(dim, str) and dim not in SYMBOLS:
            raise fields.problem("shape", f"has an unknown size {dim!r}, known: {', '.join(SYMBOLS)}")
    return Argument(name, cast(Kind, kind), fields.dtype("dtype"), shape)
