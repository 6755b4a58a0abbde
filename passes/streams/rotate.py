"""Software pipelining of a layer function: prologue, kernel and epilogue from a periodic schedule.

An op that starts `s` whole intervals after the first one is of stage s: while layer l is at its stage 0, the kernel
works on layer l - s at stage s (Rau, "Iterative modulo scheduling", 1994). Values that live from one round of the
kernel to the next are its arguments and results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moec.ir import Function, Module, Op, Value
from moec.ir.module import Attribute, Operand
from moec.ir.optable import OPS, infer
from moec.ir.rewrite import fresh_names, map_operand

Key = tuple[Value, int]
"""A value of the layer function, and the layer relative to the index that the call was made with."""


@dataclass(frozen=True)
class Timing:
    """When an op starts in the schedule of a layer (microseconds), and its placement attributes."""

    start_us: float
    attrs: Mapping[str, Attribute]


@dataclass
class Rounds:
    """The functions that replace a layer function; `origin` maps their ops to those of the layer function."""

    kernel: Function
    prologue: Function | None = None
    epilogue: Function | None = None
    depth: int = 0
    origin: dict[Op, Op] = field(default_factory=dict)


def rotate(module: Module, function: Function, timing: Mapping[Op, Timing], interval: float) -> Rounds:
    """Functions whose rounds start `interval` microseconds apart; `timing` has every op of `function`.

    Ops keep their order within equal starts. The cut between rounds lies where the fewest stages and carried values
    are needed.
    """
    starts = sorted({t.start_us for t in timing.values()})
    cuts = [_Cut(function, timing, interval, s) for s in starts]
    best = min(cuts, key=lambda c: (c.depth, len(c.carried), c.offset))
    return best.build(module)


class _Cut:
    """The stages that follow when rounds are counted from `offset` on."""

    def __init__(self, function: Function, timing: Mapping[Op, Timing], interval: float, offset: float) -> None:
        self.function, self.timing, self.offset = function, timing, offset
        place = {op: i for i, op in enumerate(function.ops)}
        laps = {op: math.floor((t.start_us - offset) / interval + 1e-9) for op, t in timing.items()}
        least = min(laps.values(), default=0)
        self.stage = {op: lap - least for op, lap in laps.items()}
        phase = {op: t.start_us - offset - laps[op] * interval for op, t in timing.items()}
        self.order = sorted(function.ops, key=lambda op: (round(phase[op], 6), place[op]))
        self.depth = max(self.stage.values(), default=0)
        self.made = function.producer()
        self.state = dict(zip(function.args[1:], function.returns, strict=False))
        self.carried = self._carried()

    def resolve(self, value: Value, layer: int) -> Key:
        """State of a layer is what the layer before returned."""
        return (self.state[value], layer - 1) if value in self.state else (value, layer)

    def _carried(self) -> dict[Value, int]:
        """Values that outlive a round, with the most rounds that they are needed for."""
        ages: dict[Value, int] = {}
        for op in self.function.ops:
            for operand in op.values():
                value, layer = self.resolve(operand, -self.stage[op])
                if value in self.made:
                    age = -layer - self.stage[self.made[value]]
                    if age > 0:
                        ages[value] = max(age, ages.get(value, 0))
        for value in self.function.returns:
            ages.setdefault(value, 1)
        return ages

    def slots(self) -> list[Key]:
        """(value, age) of each argument that the kernel's rounds hand on, the youngest first."""
        return [(value, age) for value, most in self.carried.items() for age in range(1, most + 1)]

    def build(self, module: Module) -> Rounds:
        name, shared = self.function.name, self.function.args[1 + len(self.function.returns) :]
        rounds = Rounds(Function(f"{name}.round" if self.depth else name, []), depth=self.depth)
        if self.depth == 0:
            rounds.kernel = self._emit(module, rounds, name, self.function.args[1:], [(0, self._initial())])
            return rounds
        slots = self.slots()
        entering: list[Key] = [(value, -age - self.stage[self.made[value]]) for value, age in slots]
        names = [Value(f"c{i}", value.type) for i, (value, _) in enumerate(slots)]

        def later(rounds: int) -> list[Key]:
            return [(value, layer + rounds) for value, layer in entering]

        depth = self.depth
        rounds.prologue = self._emit(
            module, rounds, f"{name}.fill", self.function.args[1:], [(j, self._initial()) for j in range(depth)],
            first=0, results=later(depth),
        )  # fmt: skip
        rounds.kernel = self._emit(
            module, rounds, f"{name}.round", [*names, *shared], [(0, dict(zip(entering, names, strict=True)))],
            results=later(1),
        )  # fmt: skip
        names = [Value(f"c{i}", value.type) for i, (value, _) in enumerate(slots)]
        rounds.epilogue = self._emit(
            module, rounds, f"{name}.drain", [*names, *shared],
            [(j, dict(zip(later(1), names, strict=True))) for j in range(1, depth + 1)], last=0,
        )  # fmt: skip
        return rounds

    def _initial(self) -> dict[Key, Value]:
        """Before the first layer its state is what the function is called with."""
        return {(returned, -1): arg for arg, returned in self.state.items()}

    def _emit(
        self,
        module: Module,
        rounds: Rounds,
        name: str,
        args: Sequence[Value],
        turns: Sequence[tuple[int, dict[Key, Value]]],
        first: int | None = None,
        last: int | None = None,
        results: Sequence[Key] | None = None,
    ) -> Function:
        """A function of some turns: in turn j, ops of stage s work on layer j - s, from `first` to `last`."""
        index = Value("l", self.function.args[0].type)
        fresh = {a: Value(a.name, a.type) for a in args}
        out = Function(name, [index, *fresh.values()], attrs=dict(self.function.attrs))
        env: dict[Key, Value] = {}
        for _, known in turns:
            env.update({key: fresh[value] for key, value in known.items()})
        layers: dict[int, Value] = {0: index}
        whole = set(self.function.args[1 + len(self.function.returns) :])

        def layer_of(relative: int) -> Value:
            if relative not in layers:
                layers[relative] = Value(f"l{relative}", index.type)
                out.ops.append(Op("index.affine", [index], {"scale": 1, "offset": relative}, [layers[relative]]))
            return layers[relative]

        for turn, _ in turns:
            for op in self.order:
                layer = turn - self.stage[op]
                if (first is not None and layer < first) or (last is not None and layer > last):
                    continue

                def change(value: Value, layer: int = layer) -> Value:
                    if value is self.function.args[0]:
                        return layer_of(layer)
                    return fresh[value] if value in whole else env[self.resolve(value, layer)]

                operands: list[Operand] = [map_operand(o, change) for o in op.operands]
                attrs = {**op.attrs, **self.timing[op].attrs}
                types = infer(OPS[op.name], operands, attrs, module)
                made = [Value(r.name, t) for r, t in zip(op.results, types, strict=True)]
                copy = Op(op.name, operands, attrs, made, op.loc.through("overlap") if op.loc else None)
                env.update({(r, layer): m for r, m in zip(op.results, made, strict=True)})
                out.ops.append(copy)
                rounds.origin[copy] = op
        wanted = [(v, 0) for v in self.function.returns] if results is None else results
        out.returns = [env[key] for key in wanted]
        fresh_names(out)
        return out
