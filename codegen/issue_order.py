"""A scheduled entry as the ops of the program before it was scheduled, in the order in which they are issued."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from moec.errors import MoecError
from moec.ir import Function, Module, Op, Value, print_op
from moec.ir.issue import CALLS

Placed = tuple[Op, int, int]
"""An op of the program before, its micro-batch, its layer (-1 outside of layers with exchanges)."""


class UnknownOp(MoecError):
    """A scheduled op that the program before its schedule does not have."""

    template: ClassVar[str] = (
        "CPU ranks cannot follow the schedule of @{name}: {op} in @{function} is no op of the model"
    )


def looped(module: Module, entry: Function) -> dict[Function, Op]:
    """The layer functions of an entry, and the ops that repeat them."""
    return {module.functions[str(op.attrs["func"])]: op for op in entry.ops if op.name == "repeat"}


def issue_order(base: Module, scheduled: Module, name: str, layers: Sequence[Function]) -> list[Placed]:
    """The ops of entry `name` of `base` and of its `layers` as `scheduled` issues them; other layers are left out.

    `base` is the module before its batch was split. Ops are told apart by what they work on, back to the arguments of
    the entry: by no line of the model, which may make several. Raises UnknownOp.
    """
    return _Order(base, scheduled, name, layers).place


class _Order:
    def __init__(self, base: Module, scheduled: Module, name: str, layers: Sequence[Function]) -> None:
        self.base, self.entry, self.scheduled = base, base.functions[name], scheduled
        self.calls = looped(base, self.entry)
        self.layers = layers
        self.made = {f: f.producer() for f in [self.entry, *self.layers]}
        entry = scheduled.functions[name]
        self.parts = int(str(entry.attrs.get("micro_batches", 1)))
        self._names = {a.name for a in entry.args}
        self._known = self._keys()
        self.place: list[Placed] = []
        self._follow(entry, {a: a.name for a in entry.args})

    def _keys(self) -> dict[object, list[Placed]]:
        """Every op of every micro-batch and layer by what it works on."""
        found: dict[object, list[Placed]] = defaultdict(list)
        for function in [self.entry, *self.layers]:
            for layer in self._range(function):
                for part in range(self.parts):
                    for op in function.ops:
                        key = _key(op, part, partial(self._origin, function, part, layer))
                        found[key].append((op, part, layer))
        return found

    def _range(self, function: Function) -> range:
        if function is self.entry:
            return range(-1, 0)
        attrs = self.calls[function].attrs
        return range(int(str(attrs["first"])), int(str(attrs["last"])) + 1)

    def _origin(self, function: Function, part: int, layer: int, value: Value) -> object:
        """What a value of `base` is: a result, an argument of the entry, a number of a layer."""
        made = self.made[function].get(value)
        if made is None and function is self.entry:
            name = f"{value.name}_{part}"
            return name if name in self._names else value.name
        if made is None:
            return self._argument(function, function.args.index(value), part, layer)
        if made.name == "index.affine":
            index = self._origin(function, part, layer, next(made.values()))
            assert isinstance(index, int)
            return int(str(made.attrs["scale"])) * index + int(str(made.attrs["offset"]))
        if made.name == "repeat":
            callee, place = self.base.functions[str(made.attrs["func"])], made.results.index(value)
            if callee not in self.layers:
                return callee.name, place, part
            return self._origin(callee, part, self._range(callee)[-1], callee.returns[place])
        return value, part, layer

    def _argument(self, function: Function, place: int, part: int, layer: int) -> object:
        """The layer, what the layer before returned, or what the entry gives to all."""
        if place == 0:
            return layer
        if place <= len(function.returns) and layer != self._range(function)[0]:
            return self._origin(function, part, layer - 1, function.returns[place - 1])
        operand = self.calls[function].operands[place - 1]
        return self._origin(self.entry, part, -1, operand) if isinstance(operand, Value) else operand.name

    def _follow(self, function: Function, env: dict[Value, object]) -> None:
        """Walk through a scheduled function and those that it calls; `env` says what its values are."""
        for op in function.ops:
            if op.name.startswith("event."):
                continue
            if op.name == "index.affine":
                index = env[next(op.values())]
                assert isinstance(index, int)
                env[op.result] = int(str(op.attrs["scale"])) * index + int(str(op.attrs["offset"]))
            elif op.name in CALLS:
                self._call(op, env)
            else:
                part = int(str(op.attrs.get("micro_batch", 0)))
                found = self._known.get(_key(op, part, env.__getitem__))
                if not found:
                    raise UnknownOp(name=self.entry.name, function=function.name, op=print_op(op, locations=False))
                op_of_base, _, layer = found.pop(0)
                self.place.append((op_of_base, part, layer))
                env.update({r: (b, part, layer) for r, b in zip(op.results, op_of_base.results, strict=True)})

    def _call(self, op: Op, env: dict[Value, object]) -> None:
        callee = self.scheduled.functions[str(op.attrs["func"])]
        if (same := self.base.functions.get(callee.name)) in self.calls and same not in self.layers:
            results = enumerate(op.results)
            env.update({r: (callee.name, i // self.parts, i % self.parts) for i, r in results})
            return
        given = [env[o] if isinstance(o, Value) else o.name for o in op.operands]
        first = int(str(op.attrs["layer" if op.name == "call" else "first"]))
        for layer in range(first, int(str(op.attrs.get("last", first))) + 1):
            inner = dict(zip(callee.args, [layer, *given], strict=True))
            self._follow(callee, inner)
            given[: len(op.results)] = [inner[v] for v in callee.returns]
        env.update(zip(op.results, given, strict=False))


def _key(op: Op, part: int, origin: Callable[[Value], object]) -> object:
    """What an op and its copies in a schedule have in common: what it does, and to what."""
    operands = [
        origin(o) if isinstance(o, Value) else (o.name, *(origin(i) for i in o.indices))
        for o in op.operands
    ]  # fmt: skip
    return op.name, part, tuple(operands)
