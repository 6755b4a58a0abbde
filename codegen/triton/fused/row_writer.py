"""Writes the kernel of a row-wise group: one program a row, the row in float32 registers from load to store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import SCALES, Argument, Generated, cache_of, pointer, tensor_of, width
from moec.codegen.triton.fused.groups import GROUP, Group
from moec.codegen.triton.specs.recipe import power_of_two
from moec.ir import Function, Op, Value, WeightRef


@dataclass(frozen=True)
class Tile:
    """A row in registers: a variable of shape [groups, 128] and its number of columns."""

    name: str
    columns: int


@dataclass(frozen=True)
class Pairs:
    """A rotated part: first and second members of its pairs, [heads, dims / 2] each; `suffix` names its indices."""

    first: str
    second: str
    heads: int
    suffix: str


def rows_kernel(group: Group, function: Function, name: str, in_place: Mapping[Value, Value]) -> Generated:
    """The kernel of a row-wise group; `in_place` says which result of a rotation lies where its operand does.

    Raises NoKernel for what no row can be computed by alone.
    """
    return _Writer(group, function, name, in_place).write()


@dataclass
class _Writer:
    group: Group
    function: Function
    name: str
    in_place: Mapping[Value, Value]
    body: list[str] = field(default_factory=list)
    arguments: dict[tuple[object, ...], Argument] = field(default_factory=dict)
    env: dict[Value, Tile | Pairs] = field(default_factory=dict)
    columns: dict[int, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    shorts: dict[object, str] = field(default_factory=dict)

    def write(self) -> Generated:
        outputs = self.group.outputs(self.function)
        for op in self.group.ops:
            getattr(self, "op_" + op.name.replace(".", "_"))(op)
            for result in op.results:
                if result in outputs and op.name != "quant.cast":
                    self.store(result)
        lines = ["    row = tl.program_id(0).to(tl.int64)", *(f"    {line}" for line in self.body)]
        given = sorted(self.arguments.values(), key=lambda a: a.what in ("row", "head", "size"))
        text = [
            "@triton.jit",
            f"def {self.name}({', '.join(a.name for a in given)}):",
            f'    """One row a program: {self.said()}."""',
            *lines,
        ]
        return Generated(self.name, "\n".join(text) + "\n", given, self.group.ops, outputs, self.rows())

    def said(self) -> str:
        return ", ".join(op.name for op in self.group.ops)

    def rows(self) -> str:
        op = self.group.ops[-1]
        return str(tensor_of(op.results[0] if op.results else op.operands[2]).shape[0])

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
        return self.argument(f"{self.short(of)}_ptr", pointer(tensor_of(of).dtype), "data", of)

    def distance(self, of: Value) -> str:
        """Elements from a row of `of` to the next."""
        return self.argument(f"{self.short(of)}_row", "i64", "row", of)

    def head(self, of: Value, heads: int) -> str:
        """Elements from a head of a row to the next; 0 where there is one."""
        return self.argument(f"{self.short(of)}_head", "i64", "head", of) if heads > 1 else "0"

    def input(self, op: Op, position: int) -> str:
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

    def at(self, columns: int) -> str:
        """Columns 0..columns-1 as [groups, 128]; the mask of those that exist has the suffix `_in`."""
        if columns not in self.columns:
            groups = power_of_two(-(-columns // GROUP))
            name = f"c{columns}"
            self.columns[columns] = name
            self.body.append(f"{name} = tl.arange(0, {groups})[:, None] * {GROUP} + tl.arange(0, {GROUP})[None, :]")
            self.body.append(f"{name}_in = {name} < {columns}")
        return self.columns[columns]

    def load(self, base: str, columns: int) -> str:
        at = self.at(columns)
        return self.let(f"tl.load({base} + {at}, mask={at}_in, other=0.0).to(tl.float32)")

    def vector(self, weight: Value | WeightRef, columns: int) -> str:
        """A weight of one dim, along the columns."""
        return self.load(self.data(weight), columns)

    def tile(self, operand: Value | WeightRef) -> Tile:
        """The row of an operand in registers."""
        assert isinstance(operand, Value)
        if operand not in self.env:
            columns = width(operand)
            if tensor_of(operand).quant:
                raise NoKernel(op="quant", reason=f"%{operand.name} is quantised and read element by element")
            loaded = self.load(f"{self.data(operand)} + row * {self.distance(operand)}", columns)
            self.env[operand] = Tile(loaded, columns)
        found = self.env[operand]
        if isinstance(found, Pairs):
            raise NoKernel(op="rope", reason="a rotated part is used in the kernel that rotates it")
        return found

    def store(self, result: Value) -> None:
        """Write a result; what comes after it in the group sees it as it is stored."""
        made = self.env[result]
        base = f"{self.data(result)} + row * {self.distance(result)}"
        kind = f"{self.data(result)}.dtype.element_ty"
        if isinstance(made, Pairs):
            self.store_pairs(made, base, self.head(result, made.heads), kind)
            return
        at = self.at(made.columns)
        self.body.append(f"tl.store({base} + {at}, {made.name}.to({kind}), mask={at}_in)")
        self.env[result] = Tile(self.let(f"{made.name}.to({kind}).to(tl.float32)", "s"), made.columns)

    def store_pairs(self, made: Pairs, base: str, head: str, kind: str) -> None:
        suffix = made.suffix
        for part, at in ((made.first, f"first{suffix}"), (made.second, f"second{suffix}")):
            self.body.append(
                f"tl.store({base} + head{suffix} * {head} + {at}, {part}.to({kind}), mask=pair{suffix}_in)"
            )

    # -- ops

    def op_embed(self, op: Op) -> None:
        self.gather(op, self.input(op, 0), op.operands[1])

    def op_rows_gather(self, op: Op) -> None:
        self.gather(op, self.input(op, 1), op.operands[0])

    def gather(self, op: Op, ids: str, table: Value | WeightRef) -> None:
        columns = width(table)
        line = self.let(f"tl.load({ids} + row).to(tl.int64)", "line")
        step = self.distance(table) if isinstance(table, Value) else str(columns)
        self.env[op.result] = Tile(self.load(f"{self.data(table)} + {line} * {step}", columns), columns)

    def op_moe_combine(self, op: Op) -> None:
        rows, order, weights = op.operands
        assert isinstance(rows, Value) and isinstance(order, Value) and isinstance(weights, Value)
        top_k, columns = width(order), width(rows)
        places, shares, source, step = self.data(order), self.data(weights), self.data(rows), self.distance(rows)
        at = self.at(columns)
        total = self.let(f"tl.zeros({at}.shape, dtype=tl.float32)", "total")
        self.body += [
            f"for k in tl.static_range({top_k}):",
            f"    place = tl.load({places} + row * {top_k} + k).to(tl.int64)",
            f"    part = tl.load({source} + place * {step} + {at}, mask={at}_in & (place >= 0), other=0.0)",
            f"    {total} += tl.load({shares} + row * {top_k} + k) * part.to(tl.float32)",
        ]
        self.env[op.result] = Tile(total, columns)

    def op_add(self, op: Op) -> None:
        a, b = (self.tile(o) for o in op.operands)
        self.env[op.result] = Tile(self.let(f"{a.name} + {b.name}"), a.columns)

    def op_norm_rms(self, op: Op) -> None:
        self.env[op.result] = self.normed(self.tile(op.operands[0]), op.operands[1], op)

    def op_norm_add_rms(self, op: Op) -> None:
        a, b = (self.tile(o) for o in op.operands[:2])
        total = Tile(self.let(f"{a.name} + {b.name}"), a.columns)
        self.env[op.results[0]] = total
        self.env[op.results[1]] = self.normed(total, op.operands[2], op)

    def normed(self, x: Tile, weight: Value | WeightRef, op: Op) -> Tile:
        mean = self.let(f"tl.sum(tl.sum({x.name} * {x.name}, 1), 0) / {x.columns}", "mean")
        scale = self.vector(weight, x.columns)
        return Tile(self.let(f"{x.name} * (1.0 / tl.sqrt_rn({mean} + {op.attrs['eps']})) * {scale}"), x.columns)

    def op_swiglu(self, op: Op) -> None:
        x = op.operands[0]
        assert isinstance(x, Value)
        inner = width(op.result)
        base = f"{self.data(x)} + row * {self.distance(x)}"
        gate, up = self.load(base, inner), self.load(f"{base} + {inner}", inner)
        self.env[op.result] = Tile(self.let(f"silu_mul({gate}, {up})"), inner)

    def op_quant_cast(self, op: Op) -> None:
        x, to = self.tile(op.operands[0]), tensor_of(op.result)
        assert to.quant is not None
        if to.quant.block != (1, GROUP):
            raise NoKernel(op=op.name, reason=f"granularity {op.attrs['granularity']} (1x{GROUP} has one)")
        groups = -(-x.columns // GROUP)
        scale = self.argument(f"{self.short(op.result)}_scale_ptr", "*" + SCALES[to.quant.scale], "scale", op.result)
        at = self.at(x.columns)
        power = to.quant.scale == "ue8m0"
        index = self.let(f"tl.arange(0, {power_of_two(groups)})", "g")
        base, kind = self.data(op.result), f"{self.data(op.result)}.dtype.element_ty"
        q = self.let(
            f"quantise_groups({x.name}, {scale}, row * {groups} + {index}, {index} < {groups}, {power}, {kind})", "q"
        )
        self.body.append(f"tl.store({base} + row * {x.columns} + {at}, {q}, mask={at}_in)")

    def op_rope(self, op: Op) -> None:
        x, table = op.operands[0], op.operands[2]
        assert isinstance(x, Value)
        shape = tensor_of(x).shape
        heads, per_head = (int(shape[1]), int(shape[2])) if len(shape) == 3 else (1, int(shape[1]))  # type: ignore[arg-type]
        offset, dims = int(op.attrs["offset"]), int(op.attrs["dims"])  # type: ignore[arg-type]
        if (offset, dims) != (0, per_head) and self.in_place.get(op.result) is not x:
            raise NoKernel(op=op.name, reason="part of a row is rotated while the row as it was is still wanted")
        base = f"{self.data(x)} + row * {self.distance(x)}"
        head = self.head(x, heads)
        suffix, half = f"{heads}_{dims}_{offset}", dims // 2
        position = self.let(f"tl.load({self.input(op, 1)} + row).to(tl.int64)", "position")
        angle = f"{self.data(table)} + {position} * {dims}"
        order = "interleaved" if op.attrs["interleaved"] else "halves"
        first, second = ("2 * {0}", "2 * {0} + 1") if op.attrs["interleaved"] else ("{0}", "{0} + " + str(half))
        pair = f"pair{suffix}"
        if f"{pair} = " not in "\n".join(self.body):
            self.body += [
                f"head{suffix} = tl.arange(0, {power_of_two(heads)})[:, None]",
                f"{pair} = tl.arange(0, {power_of_two(half)})[None, :]  # pairs are {order}",
                f"{pair}_in = (head{suffix} < {heads}) & ({pair} < {half})",
                f"first{suffix} = {offset} + {first.format(pair)}",
                f"second{suffix} = {offset} + {second.format(pair)}",
            ]
        cos = self.let(f"tl.load({angle} + {pair}, mask={pair} < {half}, other=0.0)", "cos")
        sin = self.let(f"tl.load({angle} + {half} + {pair}, mask={pair} < {half}, other=0.0)", "sin")
        members = [
            self.let(
                f"tl.load({base} + head{suffix} * {head} + {at}{suffix}, mask={pair}_in, other=0.0).to(tl.float32)"
            )
            for at in ("first", "second")
        ]
        a, b = members
        turned = self.let(f"{a} * {cos} - {b} * {sin}"), self.let(f"{b} * {cos} + {a} * {sin}")
        self.env[op.result] = Pairs(*turned, heads, suffix)

    def op_cache_append(self, op: Op) -> None:
        cache, _, latent, key, _, _, pages = op.operands
        kind = cache_of(cache)
        page, columns = int(kind.shape[2]), int(kind.shape[3])  # type: ignore[arg-type]
        assert isinstance(latent, Value) and isinstance(key, Value) and isinstance(cache, Value)
        sequence = self.let(f"tl.load({self.input(op, 4)} + row).to(tl.int64)", "sequence")
        position = self.let(f"tl.load({self.input(op, 5)} + row)", "position")
        entries = self.argument("max_pages", "i32", "size", str(tensor_of(pages).shape[1]))
        table = f"{self.input(op, 6)} + {sequence} * {entries} + {position} // {page}"
        slot = self.let(f"tl.load({table}).to(tl.int64) * {page} + {position} % {page}", "slot")
        to = self.argument("cache_ptr", pointer(kind.dtype), "cache", cache)
        base, element = f"{to} + {slot} * {columns}", f"{to}.dtype.element_ty"
        x, rank = self.tile(latent), width(latent)
        at = self.at(rank)
        self.body.append(f"tl.store({base} + {at}, {x.name}.to({element}), mask={at}_in)")
        made = self.env.get(key)
        if isinstance(made, Pairs):
            self.store_pairs(made, f"{base} + {rank}", "0", element)
        else:
            key_tile = self.tile(key)
            at = self.at(key_tile.columns)
            self.body.append(f"tl.store({base} + {rank} + {at}, {key_tile.name}.to({element}), mask={at}_in)")
