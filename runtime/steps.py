"""The steps of an entry of a sharded artifact: native segments, collectives between them, loops over layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from moec.runtime.fields import Fields, shortened

COLLECTIVES: Final = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "rows", "send", "recv", "dispatch", "combine",
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """A tensor in a named buffer: first element there, shape with symbols, elements from one row to the next."""

    buffer: str
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]
    ld: int


@dataclass(frozen=True, eq=False)
class Segment:
    """A native function of the kernel library and the names of its arguments, in order."""

    symbol: str
    args: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Collective:
    """Communication with the ranks along `axis`; `where` is the model's line."""

    name: str
    axis: str
    attrs: dict[str, Any]
    inputs: tuple[View, ...]
    outputs: tuple[View, ...]
    where: str


@dataclass(frozen=True, eq=False)
class Loop:
    """Steps for each layer `first..last`."""

    first: int
    last: int
    steps: tuple[Step, ...]


Step = Segment | Collective | Loop


@dataclass(frozen=True)
class Turn:
    """What a rank does next: run a step of a micro-batch in a layer (-1: outside), start it, or wait until it is over.

    `step` numbers segments and collectives in the order of the entry's steps.
    """

    what: str
    part: int
    layer: int
    step: int


TURNS: Final = ("run", "start", "wait")


def parse_turns(fields: Fields, steps: tuple[Step, ...], parts: int) -> tuple[Turn, ...]:
    """Read the turns of an entry; raises MalformedFile."""
    count = len(flat(steps))
    found = []
    for row in fields.rows("turns"):
        if not (len(row) == 4 and row[0] in TURNS and all(type(n) is int for n in row[1:])):
            raise fields.problem("turns", f"has {shortened(row)}, not [{'|'.join(TURNS)}, part, layer, step]")
        turn = Turn(*row)
        if not (0 <= turn.part < parts and turn.layer >= -1 and 0 <= turn.step < count):
            raise fields.problem("turns", f"has {shortened(row)}: there are {parts} parts and {count} steps")
        found.append(turn)
    return tuple(found)


def flat(steps: tuple[Step, ...]) -> list[Segment | Collective]:
    """Segments and collectives in order, those of loops once."""
    found: list[Segment | Collective] = []
    for step in steps:
        found += flat(step.steps) if isinstance(step, Loop) else [step]
    return found


def parse_steps(tables: list[Fields]) -> tuple[Step, ...]:
    """Read the steps of an entry; raises MalformedFile."""
    return tuple(_step(fields) for fields in tables)


def _step(fields: Fields) -> Step:
    if "steps" in fields.data:
        inner = parse_steps(fields.tables("steps"))
        return Loop(fields.integer("first", 0), fields.integer("last", 0), inner)
    if "segment" in fields.data:
        return Segment(fields.text("segment"), fields.texts("args"))
    name = fields.text("collective")
    if name not in COLLECTIVES:
        raise fields.problem("collective", f"is {name!r}, known: {', '.join(COLLECTIVES)}")
    attrs = fields.table("attrs")
    inputs, outputs = (tuple(_view(v) for v in fields.tables(key)) for key in ("inputs", "outputs"))
    return Collective(name, attrs.text("axis"), attrs.data, inputs, outputs, fields.text("where"))


def _view(fields: Fields) -> View:
    shape, dtype = fields.dims("shape"), fields.dtype("dtype")
    return View(fields.text("buffer"), fields.integer("offset", 0), dtype, shape, fields.integer("ld", 0))
