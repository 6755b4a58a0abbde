"""From a phase's entry function to the steps that run it, with every value in one arena."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moec.codegen.arena import Slot, assign
from moec.codegen.triton.aot import aligned
from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import Argument, cache_distances, cache_of, width
from moec.codegen.triton.fused.groups import VIEWS, Group, groups_of
from moec.codegen.triton.lower.order import Buffer, Order
from moec.codegen.triton.lower.places import Base, Matrix, Place, Step, cache_part, reference
from moec.codegen.triton.lower.table import KernelTable, grid_of
from moec.codegen.triton.spec import Instance
from moec.ir import Function, Module, Op, TensorType, Value, WeightRef
from moec.ir.dims import Size
from moec.ir.expr import evaluate
from moec.ir.types import BITS, SCALE_BITS

ALIGN = 256
"""Bytes to which buffers are rounded: what cuMemAlloc keeps, and more than any vector load wants."""


@dataclass
class Phase:
    """What lowering a phase shares between its functions. `bounds`: the greatest value of every run-time symbol."""

    module: Module
    name: str
    table: KernelTable
    bounds: Mapping[str, int]
    sms: int
    align: int
    """Rows to which an expert's share of the sorted rows is padded."""
    stage: str = ""
    """What the names of a later pipeline stage's entries end in."""

    @property
    def shape(self) -> str:
        """The shape class of tiles."""
        return "prefill" if self.name == "prefill" else "decode"

    def most(self, size: Size | str) -> int:
        """The greatest value of a size."""
        return evaluate(str(size), self.bounds)


@dataclass(frozen=True)
class Layer:
    """The layer that a function runs for: `index`, and `turn` more with every turn of the loop."""

    index: int
    turn: int

    def of(self, kind: str, name: str, size: int, first: int, place: tuple[int, int, int]) -> Place:
        """This layer's part of memory that holds `size` bytes for each layer from `first` on; `place` as of Place."""
        row, head, itemsize = place
        return Place(Base(kind, name, size * self.turn), (self.index - first) * size, row, head, itemsize)


class Lowering:
    """Lowers one function at one place of call: places for its values, then its steps.

    `env` gives the places of arguments; `into` the places that returned values must reach. `settle` and `fill` follow
    once the whole phase is lowered: only then is known where a called function's part of the arena begins.
    """

    def __init__(
        self,
        phase: Phase,
        function: Function,
        env: Mapping[Value, Any],
        into: Mapping[Value, Place],
        loops: bool = False,
    ) -> None:
        self.phase, self.function = phase, function
        self.env: dict[Value, Any] = dict(env)
        self.scales: dict[Value, Place] = {}
        self.extra: dict[tuple[str, object], Place] = {}
        self.into = dict(into)
        self.groups = groups_of(function)
        self.index = {op: i for i, op in enumerate(function.ops)}
        self.when = {op: i for i, g in enumerate(self.groups) for op in g.ops}
        self.uses = function.uses()
        self.slots: list[Buffer] = []
        self.now = 0
        self.order = Order(self.groups, loops)
        self.steps: list[Step] = []
        self._pending: list[Callable[[], None]] = []
        self.layers: dict[object, Any] = {}
        """The layer of each cache that the current group writes."""
        self.callees: list[Lowering] = []

    # -- places

    def slot(self, size: Size | str | int) -> Slot:
        """A buffer of `size` bytes, alive from now until it is last asked for."""
        most = size if isinstance(size, int) else self.phase.most(size)
        made = Buffer(-(-max(most, 1) // ALIGN) * ALIGN, self.now, self.now)
        made.use(self.order.stream(self.now), self.now)
        self.slots.append(made)
        return made

    def temporary(self, rows: Size | str, columns: int, itemsize: int) -> Place:
        """A buffer that only the current group needs."""
        return Place(self.slot(self.phase.most(rows) * columns * itemsize), 0, columns, columns, itemsize)

    def place(self, value: Value | WeightRef) -> Place:
        """Where a value's elements lie; made for a result that has no place yet."""
        if isinstance(value, WeightRef):
            return self.weight(value)
        if value not in self.env:
            self.env[value] = self._made(value)
        found = self.env[value]
        assert isinstance(found, Place), value
        self.touch(found)
        return found

    def scale(self, value: Value | WeightRef) -> Place:
        """Where a quantised value's scales lie."""
        if isinstance(value, WeightRef):
            return self.weight(value, scales=True)
        if value not in self.scales:
            t = value.type
            assert isinstance(t, TensorType) and t.quant is not None
            size = SCALE_BITS[t.quant.scale] // 8
            rows = t.shape[0]
            columns = -(-width(value) // t.quant.block[-1])
            self.scales[value] = Place(self.slot(rows * columns * size), 0, columns, columns, size)
        self.touch(self.scales[value])
        return self.scales[value]

    def weight(self, ref: WeightRef, scales: bool = False) -> Place:
        """A weight's elements or scales; one layer's where the reference names a layer."""
        weight = self.phase.module.weights[ref.name]
        t = weight.type
        assert isinstance(t, TensorType)
        if t.layout is not None:
            raise NoKernel(op="weight", reason=f"@{ref.name} has layout {t.layout}")
        itemsize = BITS[t.dtype] // 8
        data = int(t.elements()) * itemsize  # type: ignore[arg-type]
        size = int(t.nbytes()) - data if scales else data  # type: ignore[arg-type]
        for name, start, stop in weight.indices:
            if name != "l":
                size *= stop - start
        columns = int(t.shape[-1])  # type: ignore[arg-type]
        name = f"{ref.name}.scale" if scales else ref.name
        if not ref.indices:
            return Place(Base("weights", name), 0, columns, columns, itemsize)
        layer, first = self.env[ref.indices[0]], weight.indices[0][1]
        return layer.of("weights", name, size, first, (columns, columns, itemsize))  # type: ignore[no-any-return]

    def cache(self, cache: Value, layer: Value) -> Place:
        """A layer of the cache; the distance between rows is in elements of its type."""
        t, size = cache_of(cache), BITS[cache_of(cache).dtype] // 8
        rows = self.phase.bounds["P"] * int(t.shape[2])  # type: ignore[arg-type]
        columns, _, _ = cache_distances(t)
        name = str(self.env[cache])
        return self.env[layer].of("cache", name, rows * int(t.row_bytes()), 0, (columns, columns, size))  # type: ignore[no-any-return, arg-type]

    def _made(self, value: Value) -> Place:
        """The place of a result: its part of what it is a view of, where it must go, or a buffer of its own."""
        op = self.function.producer()[value]
        t = value.type
        assert isinstance(t, TensorType)
        if op.name in VIEWS:
            return self._view(op, value)
        if value in self.into and self._may_write(value, op):
            return self.into[value]
        if op.name == "rope" and self.rotates_in_place(op):
            source = op.operands[0]
            assert isinstance(source, Value)
            return self.place(source)
        columns, itemsize = width(value), BITS[t.dtype] // 8
        head = int(t.shape[-1]) if len(t.shape) > 2 else columns  # type: ignore[arg-type]
        slot = self.slot(t.shape[0] * columns * itemsize)
        return Place(slot, 0, columns, head, itemsize)

    def _view(self, op: Op, value: Value) -> Place:
        source = op.operands[0]
        assert isinstance(source, Value) and isinstance(source.type, TensorType) and isinstance(value.type, TensorType)
        x = self.place(source)
        if source.type.quant is not None:
            raise NoKernel(op=op.name, reason=f"%{source.name} is quantised")
        match op.name:
            case "split":
                sizes = [int(s) for s in op.attrs["sizes"]]  # type: ignore[union-attr, arg-type]
                return x.part(sum(sizes[: op.results.index(value)]))
            case "unflatten":
                return Place(x.base, x.offset, x.row, int(value.type.shape[-1]), x.itemsize)  # type: ignore[arg-type]
            case _:
                if len(source.type.shape) > 2 and x.head != int(source.type.shape[-1]):  # type: ignore[arg-type]
                    raise NoKernel(op="flatten", reason=f"%{source.name} has gaps between its heads")
                return Place(x.base, x.offset, x.row, x.row, x.itemsize)

    def _may_write(self, value: Value, made: Op) -> bool:
        """Whether a returned value may overwrite the argument that lies at its place: nobody reads that any more.

        The kernel that makes the value may still read it, element by element.
        """
        at, group = self.when[made], self.groups[self.when[made]]
        for argument in self.function.args:
            if self.env.get(argument) != self.into[value]:
                continue
            pending, readers = [argument], []
            while pending:
                for op in self.uses.get(pending.pop(), []):
                    pending += op.results if op.name in VIEWS else []
                    readers += [] if op.name in VIEWS else [op]
            others = [self.when[op] for op in readers if self.when[op] != at]
            if not all(self.order.before(self.order.stream(t), t, self.order.stream(at), at) for t in others):
                return False
            here = [op for op in readers if self.when[op] == at]
            by_element = ("add", "norm.add_rms", "norm.rms") if group.rowwise else ("add",)
            if any(op.name not in by_element for op in here):
                return False
        return True

    def touch(self, place: Place) -> None:
        # A caller's buffer lives as long as the caller says.
        if isinstance(place.base, Buffer) and place.base in self.slots:
            place.base.use(self.order.stream(self.now), self.now)

    def rotates_in_place(self, op: Op) -> bool:
        """Whether nobody wants the unrotated value: neither directly nor through another view of it."""
        value: Value = op.operands[0]  # type: ignore[assignment]
        producer = self.function.producer()
        if self.uses.get(value, []) != [op] or value in self.function.returns:
            return False
        made = producer.get(value)
        while made is not None and made.name in VIEWS:
            value = made.operands[0]  # type: ignore[assignment]
            if len(self.uses.get(value, [])) != 1:
                return False
            made = producer.get(value)
        return made is not None

    # -- steps

    def run(self) -> None:
        """Emit all steps."""
        from moec.codegen.triton.lower.emit import emit

        for number, group in enumerate(self.groups):
            self.now = number
            emit(self, group)
        self.now = len(self.groups)
        self._deliver()

    def settle(self, base: int = 0) -> int:
        """Place all buffers from byte `base` on, those of called functions behind the caller's; returns the end."""
        if self.order.several and self.order.loops and (odd := [s for s in self.slots if not self.order.turns(s, s)]):
            when = self.groups[odd[0].first].anchor.name
            raise NoKernel(op=when, reason=f"a buffer of @{self.function.name} would be in use by two layers at once")
        own = base + assign(self.slots, self.order.meet)
        for slot in self.slots:
            slot.offset += base
        # What runs on several streams may not have ended when the next function begins.
        end, following = own, own
        for callee in self.callees:
            last = callee.settle(following if callee.order.several else own)
            following = last if callee.order.several else following
            end = max(end, last)
        return end

    def fill(self) -> None:
        """Write the places into the steps."""
        for one in self._pending:
            one()
        for callee in self.callees:
            callee.fill()

    def _deliver(self) -> None:
        """Copy returned values that could not be written where the caller wants them."""
        for value, place in self.into.items():
            if self.place(value) != place:
                if self.order.several and not self._may_copy(value, place):
                    raise NoKernel(op="return", reason=f"%{value.name} must be copied while other streams may use it")
                t = value.type
                assert isinstance(t, TensorType)
                step = self.step({"copy": None, "bytes": str(t.nbytes())})
                self.later(step, "copy", (place, self.place(value)))

    def _may_copy(self, value: Value, to: Place) -> bool:
        """Whether the main stream may copy a value at the end of a turn: it is there, nobody reads any more what lies
        at its place, and who reads it in the next turn waits for the main stream."""
        made, main, end = self.function.producer().get(value), self.order.main, len(self.groups)
        if made is None or not self.order.before(self.order.stream(self.when[made]), self.when[made], main, end):
            return False
        readers = [o for a in self.function.args if self.env.get(a) == to for o in self.uses.get(a, [])]
        at = [(self.order.stream(self.when[o]), self.when[o]) for o in readers if o in self.when]
        return all(self.order.before(s, t, main, end) and self.order.before_next(main, end, s, t) for s, t in at)

    def step(self, step: Step) -> Step:
        """Append a step, on the stream of the current group."""
        if self.now < len(self.groups) and "stream" in self.groups[self.now].anchor.attrs:
            step["stream"] = self.groups[self.now].anchor.attrs["stream"]
        elif self.now == len(self.groups) and self.order.several:
            step["stream"] = self.order.main  # without one it would wait for all streams
        self.steps.append(step)
        return step

    def later(self, step: Step, key: str, places: Sequence[Place] | Place | Matrix) -> None:
        """Fill in references once the arena is assigned."""

        def write() -> None:
            if isinstance(places, Place | Matrix):
                step[key] = reference(places)
            else:
                step[key] = [reference(p) for p in places]

        self._pending.append(write)

    def launch(
        self, instance: Instance, group: Group, arguments: Mapping[str, Any], sizes: Mapping[str, int | str]
    ) -> None:
        """A launch of a kernel for a group; arguments are places, numbers, or expressions over run-time symbols."""
        ops = [(self.index[op], op) for op in group.ops]
        ops += [(self.index[v], v) for v in self._views_of(group)]
        odd = {n for n in instance.signature if _odd(arguments[n])}
        instance = replace(instance, loose=tuple(n for n in instance.signature if n in odd and n in aligned(instance)))
        entry = self.function.name + (self.phase.stage if self.function.name == self.phase.name else "")
        name = self.phase.table.add(instance, entry, ops)
        given: dict[str, Any] = {}
        self.step({"kernel": name, "grid": grid_of(instance, dict(sizes)), "arguments": given})
        for argument in instance.signature:
            value = arguments[argument]
            if isinstance(value, Place | Matrix):
                self.touch(value.place if isinstance(value, Matrix) else value)
                given[argument] = None
                self.later(given, argument, value)
            else:
                given[argument] = value

    def _views_of(self, group: Group) -> list[Op]:
        """The views through which a group reads: they are part of its addressing."""
        producer = self.function.producer()
        found: list[Op] = []
        pending = [v for op in group.ops for v in op.values()]
        while pending:
            made = producer.get(pending.pop())
            if made is not None and made.name in VIEWS and made not in found:
                found.append(made)
                pending += [v for v in made.values()]
        return found

    def bind(self, argument: Argument) -> Any:
        """The value of a generated kernel's argument."""
        of = argument.of
        match argument.what:
            case "size":
                return of
            case "data":
                assert isinstance(of, Value | WeightRef)
                return self.place(of)
            case "scale":
                assert isinstance(of, Value | WeightRef)
                return self.scale(of)
            case "row":
                assert isinstance(of, Value)
                return self.place(of).row
            case "head":
                assert isinstance(of, Value)
                return self.place(of).head
            case "source" | "blocks":
                return self.extra[argument.what, of]
            case "cache" | "cache_scale" | "cache_exact":
                assert isinstance(of, Value)
                return cache_part(self.cache(of, self.layers[of]), cache_of(of), argument.what)
        raise AssertionError(argument)


def _odd(value: Any) -> bool:
    """Whether an argument is not always a multiple of 16: bytes of a place, or a number."""
    if isinstance(value, Place):
        turn = value.base.turn if isinstance(value.base, Base) else 0
        return bool(value.offset % 16 or turn % 16)
    return not isinstance(value, int) or value % 16 != 0
