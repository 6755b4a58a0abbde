"""The steps of an entry of a sharded artifact: native segments, collectives between them, loops over layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from moec.runtime.fields import Fields

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
    dtype = np.dtype(fields.text("dtype"))
    shape = fields.dims("shape")
    return View(fields.text("buffer"), fields.integer("offset", 0), dtype, shape, fields.integer("ld", 0))
