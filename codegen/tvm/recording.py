"""The experts that every token was sent to, left for the runtime in one more output of an entry.

Memory of a router's choices is soon used again, so they are copied at once: a few bytes a token and layer. The output
`routed` i32[routers, most tokens, top_k] has a row for each router of each layer; entries of plan.json say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import const
from moec.ir import Function, Module, Op, TensorType, Value, WeightRef


@dataclass(frozen=True)
class Routers:
    """Routers of an entry in the order in which they run: the layer of each, and the first one of every `repeat`."""

    layers: tuple[int, ...]
    first: Mapping[Op, int]
    experts: int
    top_k: int
    rows: str
    """Tokens that a call routes: `T`, all of it, or `U`, a tensor-parallel rank's part."""

    @staticmethod
    def of(module: Module, entry: Function) -> Routers | None:
        """Those of an entry function; None when it has none, or routers that differ in what they choose from."""
        layers: list[int] = []
        first: dict[Op, int] = {}
        kinds: set[tuple[int, int, str]] = set()
        for op in entry.ops:
            routes = _routes(module, op)
            if not routes:
                continue
            first[op] = len(layers)
            for layer in range(int(op.attrs["first"]), int(op.attrs["last"]) + 1):  # type: ignore[arg-type]
                layers += [layer * len(routes) + i for i in range(len(routes))]
            kinds |= {_kind(route) for route in routes}
        if len(kinds) != 1:
            return None
        return Routers(tuple(layers), first, *kinds.pop())

    def as_json(self) -> dict[str, Any]:
        """How plan.json describes the output."""
        return {"layers": list(self.layers), "experts": self.experts, "rows": self.rows}


@dataclass(frozen=True)
class Record:
    """Where the routers of one layer function leave their choices: a flat view, and the first element of each."""

    sink: Any
    start: dict[Op, Any] = field(default_factory=dict)

    @staticmethod
    def of_layer(routers: Routers, sink: Any, most: int, module: Module, call: Op, layer: Any) -> Record:
        """For the `repeat` that calls a layer function; `most` tokens a call."""
        routes = _routes(module, call)
        at = (layer - int(call.attrs["first"])) * len(routes) + routers.first.get(call, 0)  # type: ignore[arg-type]
        each = const(most * routers.top_k, "int64")
        return Record(sink, {route: T.Cast("int64", at + i) * each for i, route in enumerate(routes)})

    def keep(self, route: Op, source: Any, first: Any, count: Any) -> None:
        """Copy the `count` tokens' choices of a router, which begin at element `first` of `source`."""
        start = self.start[route]
        ids = route.results[0].type
        assert isinstance(ids, TensorType)
        with T.serial(0, count * int(ids.shape[1])) as i:  # type: ignore[arg-type]
            wide = T.Cast("int64", i)
            T.buffer_store(self.sink, T.reinterpret("int32", source[const(0, "int64") + first + wide]), [start + wide])


def _routes(module: Module, op: Op) -> list[Op]:
    """The routers of the layer function that a `repeat` calls."""
    if op.name != "repeat":
        return []
    return [o for o in module.functions[str(op.attrs["func"])].ops if o.name == "moe.route"]


def _kind(route: Op) -> tuple[int, int, str]:
    """Experts, how many of them a token chooses, and the name of the number of tokens."""
    gate, ids = route.operands[1], route.results[0].type
    assert isinstance(gate, WeightRef | Value) and isinstance(gate.type, TensorType) and isinstance(ids, TensorType)
    return int(gate.type.shape[-2]), int(ids.shape[1]), str(ids.shape[0])  # type: ignore[arg-type]
