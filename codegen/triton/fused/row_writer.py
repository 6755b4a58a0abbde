"""The text of a row-wise kernel in the making: one program a row, the row in float32 registers from load to store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import Argument, Generated, pointer, tensor_of, width
from moec.codegen.triton.fused.groups import GROUP, Group
from moec.codegen.triton.specs.recipe import power_of_two
from moec.ir import Function, Op, Value, WeightRef


@dataclass(frozen=True)
class Shape:
    """How a row lies in registers: [columns / 128, 128], or with `heads` [heads, columns]; padded to powers of two."""

    columns: int
    heads: int = 0

    @property
    def name(self) -> str:
        """The variable that holds the columns' numbers."""
        return f"d{self.heads}x{self.columns}" if self.heads else f"c{self.columns}"

    @property
    def inside(self) -> str:
        """The variable that says which elements exist."""
        return f"{self.name}_in"

    @property
    def lanes(self) -> tuple[int, int]:
        """Rows and columns of the register tile."""
        if self.heads:
            return power_of_two(self.heads), power_of_two(self.columns)
        return power_of_two(-(-self.columns // GROUP)), GROUP


@dataclass(frozen=True)
class Tile:
    """A row in registers: a variable and its shape."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Pairs:
    """A rotated part of `source`'s heads: first and second members of its pairs, [heads, dims / 2] each.

    `suffix` names the indices of the pairs; elements outside `offset..offset+dims` of a head stay what they are.
    """

    first: str
    second: str
    suffix: str
    shape: Shape
    source: Value
    offset: int
    dims: int


@dataclass
class RowWriter:
    """Collects arguments and lines; the ops of `row_ops.OPS` write through it."""

    group: Group
    function: Function
    name: str
    in_place: Mapping[Value, Value]
    body: list[str] = field(default_factory=list)
    arguments: dict[tuple[object, ...], Argument] = field(default_factory=dict)
    env: dict[Value, Tile | Pairs] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)
    shorts: dict[object, str] = field(default_factory=dict)
    to: str = "row"
    """The row that results are written to."""

    def write(self, ops: Mapping[str, Callable[[RowWriter, Op], None]]) -> Generated:
        """The kernel; raises NoKernel for what no row can be computed by alone."""
        outputs = self.group.outputs(self.function)
        for op in self.group.ops:
            ops[op.name](self, op)
            for result in op.results:
                if result in outputs and op.name != "quant.cast":
                    self.store(result)
        lines = ["    row = tl.program_id(0).to(tl.int64)", *(f"    {line}" for line in self.body)]
        given = sorted(self.arguments.values(), key=lambda a: a.what in ("row", "head", "size"))
        text = [
            "@triton.jit",
            f"def {self.name}({', '.join(a.name for a in given)}):",
            f'    """One row a program: {", ".join(op.name for op in self.group.ops)}."""',
            *lines,
        ]
        last = self.group.ops[-1]
        rows = str(tensor_of(last.results[0] if last.results else last.operands[2]).shape[0])
        return Generated(self.name, "\n".join(text) + "\n", given, self.group.ops, outputs, rows)

    # -- arguments

    def argument(self, base: str, kind: str, what: str, of: Value | WeightRef | str | int) -> str:
        """The name of the argument for (what, of), made when it is new."""
        key = (what, repr(of) if isinstance(of, WeightRef) else of)
        if key not in self.arguments:
            self.arguments[key] = Argument(base, kind, what, of)  # type: ignore[arg-type]
        return self.arguments[key].name

    def short(self, of: Value | WeightRef) -> str:
        """x0, x1, ... for values and w0, ... for weights by first use: equal kernels get equal text."""
        key = repr(of) if isinstance(of, WeightRef) else of
        stem = "w" if isinstance(of, WeightRef) else "x"
        if key not in self.shorts:
            self.shorts[key] = f"{stem}{sum(n.startswith(stem) for n in self.shorts.values())}"
        return self.shorts[key]

    def data(self, of: Value | WeightRef) -> str:
        """A pointer to the elements of a value or weight."""
        return self.argument(f"{self.short(of)}_ptr", pointer(tensor_of(of).dtype), "data", of)

    def distance(self, of: Value) -> str:
        """Elements from a row of `of` to the next."""
        return self.argument(f"{self.short(of)}_row", "i64", "row", of)

    def head(self, of: Value) -> str:
        """Elements from a head of a row to the next; 0 where there is one."""
        return self.argument(f"{self.short(of)}_head", "i64", "head", of) if shape_of(of).heads > 1 else "0"

    def input(self, op: Op, position: int) -> str:
        """A pointer to an operand."""
        operand = op.operands[position]
        assert isinstance(operand, Value)
        return self.data(operand)

    # -- tiles

    def let(self, expression: str, stem: str = "t") -> str:
        """A fresh variable with the value of an expression."""
        number = self.counts.get(stem, 0)
        self.counts[stem] = number + 1
        self.body.append(f"{stem}{number} = {expression}")
        return f"{stem}{number}"

    def once(self, name: str, lines: list[str]) -> None:
        """Lines that define `name`, written where it is first wanted."""
        if name not in self.known:
            self.known.add(name)
            self.body += lines

    def at(self, shape: Shape, head: str = "") -> str:
        """Distances of a row's elements from its first; `head`: between its heads."""
        name, (high, wide) = shape.name, shape.lanes
        if shape.heads:
            rows, columns = f"tl.arange(0, {high})[:, None]", f"tl.arange(0, {wide})[None, :]"
            self.once(name, [
                f"{name}_head = {rows}", f"{name} = {columns}",
                f"{shape.inside} = ({name}_head < {shape.heads}) & ({name} < {shape.columns})",
            ])  # fmt: skip
            return f"{name}_head * {head or shape.columns} + {name}"
        lanes = f"tl.arange(0, {high})[:, None] * {GROUP} + tl.arange(0, {GROUP})[None, :]"
        self.once(name, [f"{name} = {lanes}", f"{shape.inside} = {name} < {shape.columns}"])
        return name

    def load(self, base: str, shape: Shape, head: str = "") -> str:
        """Elements behind `base` in float32, zeros outside."""
        at = self.at(shape, head)
        return self.let(f"tl.load({base} + {at}, mask={shape.inside}, other=0.0).to(tl.float32)")

    def vector(self, weight: Value | WeightRef, shape: Shape) -> str:
        """A weight of one dim along the columns, the same for every head."""
        if not shape.heads:
            return self.load(self.data(weight), shape)
        self.at(shape)
        mask = f"{shape.name} < {shape.columns}"
        return self.let(f"tl.load({self.data(weight)} + {shape.name}, mask={mask}, other=0.0).to(tl.float32)")

    def row_of(self, of: Value, row: str = "row") -> str:
        """A pointer to a row of a value."""
        return f"{self.data(of)} + {row} * {self.distance(of)}"

    def tile(self, operand: Value | WeightRef) -> Tile:
        """The row of an operand in registers."""
        assert isinstance(operand, Value)
        if operand not in self.env:
            if tensor_of(operand).quant:
                raise NoKernel(op="quant", reason=f"%{operand.name} is quantised and read element by element")
            shape = shape_of(operand)
            head = self.head(operand) if shape.heads else ""
            self.env[operand] = Tile(self.load(self.row_of(operand), shape, head), shape)
        found = self.env[operand]
        if isinstance(found, Pairs):
            raise NoKernel(op="rope", reason="a rotated part is used in the kernel that rotates it")
        return found

    def store(self, result: Value) -> None:
        """Write a result; what comes after it in the group sees it as it is stored."""
        made = self.env[result]
        kind = f"{self.data(result)}.dtype.element_ty"
        base = self.row_of(result, self.to)
        if isinstance(made, Pairs):
            self.store_pairs(made, base, self.head(result), kind)
            return
        at = self.at(made.shape, self.head(result) if made.shape.heads else "")
        self.body.append(f"tl.store({base} + {at}, {made.name}.to({kind}), mask={made.shape.inside})")
        self.env[result] = Tile(self.let(f"{made.name}.to({kind}).to(tl.float32)", "s"), made.shape)

    def store_pairs(self, made: Pairs, base: str, head: str, kind: str) -> None:
        """Write both members of every rotated pair."""
        suffix = made.suffix
        for part, at in ((made.first, f"first{suffix}"), (made.second, f"second{suffix}")):
            self.body.append(
                f"tl.store({base} + head{suffix} * {head} + {at}, {part}.to({kind}), mask=pair{suffix}_in)"
            )


def shape_of(operand: Value | WeightRef) -> Shape:
    """The register shape of a value: by heads where it has three dims."""
    dims = tensor_of(operand).shape
    if len(dims) == 3:
        return Shape(int(dims[2]), int(dims[1]))  # type: ignore[arg-type]
    return Shape(width(operand))
