"""Writes the kernel of a matrix product and of what is done on its tile before it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import SCALES, Argument, Generated, pointer, tensor_of
from moec.codegen.triton.fused.groups import GROUP
from moec.ir import Op, TensorType, Value, WeightRef
from moec.ir.dims import Size

Rows = Literal["dense", "heads", "grouped"]
Form = Literal["fp8", "plain", "widened"]


@dataclass(frozen=True)
class Bias:
    """Add a vector along the columns."""

    of: Value | WeightRef


@dataclass(frozen=True)
class Add:
    """Add a tensor of the result's shape."""

    of: Value


@dataclass(frozen=True)
class SwiGlu:
    """The two products of a pair become `silu(gate) * up`; attributes as of the op `swiglu`, limit 0 for none."""

    limit: float = 0.0
    alpha: float = 1.0
    shift: float = 0.0

    @staticmethod
    def of(attrs: Mapping[str, Any]) -> SwiGlu:
        """The activation that an op's attributes describe."""
        return SwiGlu(**{n: float(attrs[n]) for n in ("limit", "alpha", "shift") if n in attrs})

    def text(self, gate: str, up: str) -> str:
        """Its expression in a kernel."""
        if self == SwiGlu():
            return f"silu_mul({gate}, {up})"
        return f"limited_silu_mul({gate}, {up}, {self.limit}, {self.alpha}, {self.shift})"


@dataclass(frozen=True)
class Store:
    """Write the tile; with a quantised type, in groups of 128 columns with their scales."""

    to: Value


Step = Bias | Add | SwiGlu | Store


@dataclass(frozen=True)
class Product:
    """`a · bᵀ` and the steps on its tile.

    `rows`: dense, one product for each head, or rows sorted by expert; `gathered`: those are fetched from the tokens by
    the dispatch's index. A pair's weight holds the gate's rows, then those of the up projection.
    """

    a: Value
    b: Value | WeightRef
    rows: Rows
    steps: tuple[Step, ...]
    gathered: bool = False
    raw: bool = False
    """FP8 weights come as bytes: the device's own instructions do not know the format."""
    part: tuple[int, int, int] | None = None
    """Of a product per head: rows (start, stop) of the rows that each head owns in a matrix."""
    transposed: bool = False
    """Of a product per head: B's rows are summed over, its columns are those of the result."""
    masked: bool = False
    """Of rows sorted by expert: each owns `capacity` rows, and a count says how many of them it uses."""
    boxed: bool = True
    """Whether rows lie where tensor descriptors can name them."""

    @property
    def pair(self) -> bool:
        """Whether two products share the rows of A."""
        return any(isinstance(s, SwiGlu) for s in self.steps)

    @property
    def form(self) -> Form:
        """How operands meet: both FP8, both as they are, or FP8 weights widened to A's type."""
        return form_of(tensor_of(self.a), tensor_of(self.b))

    @property
    def wide(self) -> bool:
        """Whether an operand is float32: the products are made outside the tensor cores then."""
        return "f32" in (tensor_of(self.a).dtype, tensor_of(self.b).dtype)

    @property
    def columns(self) -> int:
        """Columns of the result."""
        n = self._stored[self.transposed]
        return n // 2 if self.pair else n

    @property
    def inner(self) -> int:
        """Elements that are multiplied and summed."""
        return self._stored[not self.transposed]

    @property
    def _stored(self) -> tuple[int, int]:
        """Rows and columns of one product's part of B."""
        rows, columns = (_integer(d) for d in tensor_of(self.b).shape[-2:])
        return (rows if self.part is None else self.part[1] - self.part[0]), columns

    @property
    def boxes(self) -> dict[str, str]:
        """The operands that a tensor descriptor can name, and its boxes; rows that an index names are not in one."""
        if self.rows == "heads" or not self.boxed or self.raw:
            return {}
        depth = "{BK}" if self.form == "plain" else str(GROUP)
        return {**({} if self.gathered else {"a_ptr": f"[{{BM}}, {depth}]"}), "b_ptr": f"[{{BN}}, {depth}]"}

    @property
    def quantises(self) -> bool:
        """Whether a result is quantised, so that a tile must hold whole groups."""
        return any(isinstance(s, Store) and tensor_of(s.to).quant for s in self.steps)


def _integer(size: Size) -> int:
    assert isinstance(size, int)
    return size


def form_of(a: TensorType, b: TensorType) -> Form:
    """How a product of these types is formed. Raises NoKernel for types that none takes."""
    if b.quant is not None and (b.dtype != "fp8_e4m3" or len(b.quant.block) != 2 or b.quant.block[1] != GROUP):
        raise NoKernel(op="linear", reason=f"weights are {b}; FP8 has one scale for {GROUP} columns")
    if a.quant is not None:
        if b.quant is None or a.dtype != "fp8_e4m3" or a.quant.block != (1, GROUP):
            raise NoKernel(op="linear", reason=f"no product of {a} with {b}")
        return "fp8"
    if b.quant is not None:
        return "widened"
    if a.dtype != b.dtype and {a.dtype, b.dtype} != {"bf16", "f32"}:
        raise NoKernel(op="linear", reason=f"no product of {a} with {b}")
    return "plain"


def product_kernel(product: Product, name: str, ops: Sequence[Op], rows: str) -> Generated:
    """The kernel of a product; `rows` is how many rows it has, over the run-time symbols. Raises NoKernel."""
    return _Writer(product, name, list(ops), rows).write()


@dataclass
class _Writer:
    product: Product
    name: str
    ops: list[Op]
    rows: str
    pointers: list[Argument] = field(default_factory=list)
    numbers: list[Argument] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    def write(self) -> Generated:
        p = self.product
        self._pointer("a_ptr", pointer(tensor_of(p.a).dtype), "data", p.a)
        if p.form == "fp8":
            self._pointer("a_scale_ptr", "*" + SCALES[str(tensor_of(p.a).quant.scale)], "scale", p.a)  # type: ignore[union-attr]
        self._pointer("b_ptr", "*u8" if p.raw else pointer(tensor_of(p.b).dtype), "data", p.b)
        if p.form != "plain":
            self._pointer("b_scale_ptr", "*" + SCALES[str(tensor_of(p.b).quant.scale)], "scale", p.b)  # type: ignore[union-attr]
        if p.rows == "grouped":
            self._pointer("layout_ptr", "*i32", "blocks", p.a)
        if p.gathered:
            self._pointer("source_ptr", "*i32", "source", p.a)
        if p.rows != "grouped":
            self._number("M", "i32", "size", self.rows)
        self._number("N", "i32", "size", p.columns)
        self._number("K", "i32", "size", p.inner)
        self._number("a_row", "i64", "row", p.a)
        tile = self._tile()
        self._products()
        for number, step in enumerate(p.steps):
            self._step(step, number)
        constants = ["BM", "BN", *(["BK"] if p.form == "plain" else [])]
        constants += ["GROUP_M"] if p.rows != "grouped" else ["ALIGN"]
        constants += ["EVEN_K", *(["TMA", "WS"] if p.boxes else [])]
        given = self.pointers + self.numbers
        arguments = [*(a.name for a in given), *(f"{c}: tl.constexpr" for c in constants)]
        indent = "    "
        lines = [*tile]
        if p.rows == "grouped":
            lines.append("if used > 0:")
            lines += [indent + line for line in self.body]
        else:
            lines += self.body
        text = [
            "@triton.jit",
            f"def {self.name}(",
            *(f"    {', '.join(arguments[i : i + 8])}," for i in range(0, len(arguments), 8)),
            "):  # fmt: skip",
            f'    """{self._said()}"""',
            *(indent + line for line in lines),
        ]
        outputs = [s.to for s in p.steps if isinstance(s, Store)]
        dims = {"N": p.columns, "K": p.inner}
        return Generated(self.name, "\n".join(text) + "\n", given, self.ops, outputs, self.rows, dims, p)

    def _said(self) -> str:
        p = self.product
        how = {"fp8": "FP8 by FP8", "plain": "as stored", "widened": "FP8 weights widened"}[p.form]
        steps = [type(s).__name__.lower() for s in p.steps]
        rows = {"dense": "", "heads": "one product a head, ", "grouped": "rows sorted by expert, "}[p.rows]
        return f"a[{'gathered ' if p.gathered else ''}rows, K] times b[N, K]: {rows}{how}; then {', '.join(steps)}."

    def _pointer(self, name: str, kind: str, what: str, of: Value | WeightRef) -> str:
        self.pointers.append(Argument(name, kind, what, of))  # type: ignore[arg-type]
        return name

    def _number(self, name: str, kind: str, what: str, of: Value | str | int) -> str:
        self.numbers.append(Argument(name, kind, what, of))  # type: ignore[arg-type]
        return name

    def _tile(self) -> list[str]:
        """Which rows and columns the program owns, and what guards it."""
        p = self.product
        if p.rows == "grouped":
            source = ["source = tl.load(source_ptr + rows)", "am = tl.where(source >= 0, source, 0).to(tl.int64)"]
            self.body += [
                "pn = tl.program_id(0)",
                "rm = tl.arange(0, BM)",
                "rows = first + rm",
                "live = rm < used",
                *(source if p.gathered else ["am = tl.where(live, rows, first)" if p.masked else "am = rows"]),
            ]
            capacity = self._number("capacity", "i32", "size", "CAPACITY") if p.masked else "0"
            return [f"expert, first, used = expert_block(layout_ptr, {capacity}, BM, ALIGN)"]
        self.body += [
            "pm, pn = grouped_order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)",
            "rm = pm * BM + tl.arange(0, BM)",
            "live = rm < M",
            "# Rows past the end read row 0 instead of a mask: the loads stay whole and the store drops them.",
            "am = tl.where(live, rm, 0).to(tl.int64)",
            "rows = rm.to(tl.int64)",
        ]
        if p.rows == "heads":
            self.body.append("head = tl.program_id(1).to(tl.int64)")
            self._number("a_head", "i64", "head", p.a)
        return []

    def _products(self) -> None:
        p = self.product
        lead = {"dense": "", "heads": "head * N * K", "grouped": f"expert * {2 if p.pair else 1} * N * K"}[p.rows]
        if p.part is not None:
            lead = f"{self._first_row()} * {'N' if p.transposed else 'K'}"
        plus = f" + {lead}" if lead else ""
        first = {"dense": "pm * BM", "heads": "0", "grouped": "first.to(tl.int32)"}[p.rows]
        b_first = f"(expert * {2 if p.pair else 1} * N).to(tl.int32) + pn * BN"
        a_rows = "a_ptr + am * a_row" + (" + head * a_head" if p.rows == "heads" else "")
        b_rows = f"b_ptr{plus} + bn" + ("" if p.transposed else " * K")
        a_tma, b_tma, ws = ("TMA" if "a_ptr" in p.boxes else "False", *(("TMA", "WS") if p.boxes else ("False",) * 2))
        self.body += [
            "rn = pn * BN + tl.arange(0, BN)",
            "bn = tl.where(rn < N, rn, 0).to(tl.int64)",
            f"a_from = {'a_ptr if TMA else ' if a_tma == 'TMA' else ''}{a_rows}",
            f"b_from = {'b_ptr if TMA else ' if b_tma == 'TMA' else ''}{b_rows}",
            f"b_first = {b_first if p.rows == 'grouped' else 'pn * BN'}",
        ]
        scaled = p.form != "plain"
        if scaled:
            self.body.append(f"groups = tl.cdiv({'N' if p.transposed else 'K'}, 128)")
            self.body.append(f"b_scale_row = {self._scale_row('0')}")
        a = ["a_from", first, "a_scale_ptr + am * groups" if p.form == "fp8" else "None"]
        b_scale = "b_scale_row" if scaled else "None"
        sizes = ["K", "BM", "BN", "128" if scaled else "BK", "EVEN_K", a_tma, b_tma, ws]
        if p.pair:
            self.body.append(f"up_from = {'b_ptr if TMA else ' if b_tma == 'TMA' else ''}b_from + N.to(tl.int64) * K")
            up = self._up_scales() if scaled else ["None", "None", "None"]
            b = ["b_from", "b_first", b_scale, "up_from", "b_first + N", *up]
        else:
            b_step, scale_step = ("N", "groups" if scaled else "1") if p.transposed else ("1", "1")
            b = ["b_from", "b_first", b_step, b_scale, scale_step]
        to, kind = ("gate, up", "pair") if p.pair else ("acc", "rows")
        self.body.append(f"{to} = product_{kind}({', '.join([*a, *b, *sizes])})")
        self.body.append("keep = live[:, None] & (rn < N)[None, :]")

    def _up_scales(self) -> list[str]:
        """Pointer to the up projection's scales, and the second of a tile that lies in two blocks of rows."""
        p = self.product
        quant = tensor_of(p.b).quant
        assert quant is not None
        block = int(quant.block[0])
        if block % GROUP or p.columns % GROUP == 0:
            self.body.append(f"up_scale_row = {self._scale_row('N')}")
            return ["up_scale_row", "None", "None"]
        self.body += [
            f"up_block = (N + pn * BN) // {block}",
            f"up_scale_row = b_scale_ptr{self._scale_lead()} + up_block * groups",
            f"last_block = (2 * N - 1) // {block}",
            f"up_scale_next = b_scale_ptr{self._scale_lead()} + tl.minimum(up_block + 1, last_block) * groups",
            f"up_first = ((N + rn) // {block} == up_block)[None, :]",
        ]
        return ["up_scale_row", "up_scale_next", "up_first"]

    def _first_row(self) -> str:
        """The row at which a head's part of a matrix begins."""
        assert self.product.part is not None
        start, _, rows = self.product.part
        return f"(head * {rows} + {start})" if start else f"(head * {rows})"

    def _scale_row(self, first: str) -> str:
        """Pointer to B's scales of the tile's columns, which begin at row `first` of the weight."""
        p = self.product
        b = tensor_of(p.b)
        assert b.quant is not None
        block = int(b.quant.block[0])
        if p.part is not None:
            cut = any(n % block for n in p.part)
            if block % GROUP or cut or (p.transposed and block != GROUP):
                raise NoKernel(op="linear.heads", reason=f"rows {list(p.part)} of {b} do not follow its scales")
            row = f"{self._first_row()} // {block}"
            at = f"{row} * groups + pn * BN // {GROUP}" if p.transposed else f"({row} + pn * BN // {block}) * groups"
            return f"b_scale_ptr + {at}"
        lead = self._scale_lead()
        # A tile lies under one row of scales when blocks are not cut by it; else each column has its own pointer.
        if block % GROUP == 0 and (first == "0" or p.columns % GROUP == 0):
            begin = f"({first} + pn * BN)" if first != "0" else "(pn * BN)"
            return f"b_scale_ptr{lead} + {begin} // {block} * groups"
        begin = f"({first} + bn)" if first != "0" else "bn"
        return f"(b_scale_ptr{lead} + {begin} // {block} * groups)[None, :]"

    def _scale_lead(self) -> str:
        """From B's first scale to that of the head or expert."""
        b, of = tensor_of(self.product.b), {"heads": "head", "grouped": "expert"}.get(self.product.rows)
        assert b.quant is not None
        return f" + {of} * {-(-_integer(b.shape[-2]) // int(b.quant.block[0]))} * groups" if of else ""

    def _step(self, step: Step, number: int) -> None:
        match step:
            case SwiGlu():
                self.body.append(f"acc = {step.text('gate', 'up')}")
            case Bias(of):
                name = self._pointer(f"bias{number}_ptr", pointer(tensor_of(of).dtype), "data", of)
                before = any(isinstance(s, SwiGlu) for s in self.product.steps[number:])
                lead = f" + expert * {2 if before else 1} * N" if self.product.rows == "grouped" else ""
                parts = (("gate", ""), ("up", " + N")) if before else (("acc", ""),)
                for to, plus in parts:
                    self.body.append(f"{to} += tl.load({name}{lead}{plus} + bn).to(tl.float32)[None, :]")
            case Add(of):
                name = self._pointer(f"add{number}_ptr", pointer(tensor_of(of).dtype), "data", of)
                row = self._number(f"add{number}_row", "i64", "row", of)
                self.body.append(f"add_at = {name} + am[:, None] * {row} + bn[None, :]")
                self.body.append("acc += tl.load(add_at).to(tl.float32)")
            case Store(to) if tensor_of(to).quant is not None:
                self._store_quantised(to, number)
            case Store(to):
                self._store(to, number)

    def _store(self, to: Value, number: int) -> None:
        name = self._pointer(f"c{number}_ptr", pointer(tensor_of(to).dtype), "data", to)
        row = self._number(f"c{number}_row", "i64", "row", to)
        at = f"{name} + rows[:, None] * {row} + rn[None, :]"
        if self.product.rows == "heads":
            at += f" + head * {self._number(f'c{number}_head', 'i64', 'head', to)}"
        self.body.append(f"tl.store({at}, acc.to({name}.dtype.element_ty), mask=keep)")
        if number + 1 < len(self.product.steps):
            # What follows sees the value as it is stored.
            self.body.append(f"acc = acc.to({name}.dtype.element_ty).to(tl.float32)")

    def _store_quantised(self, to: Value, number: int) -> None:
        quant = tensor_of(to).quant
        assert quant is not None and self.product.rows != "heads"
        name = self._pointer(f"c{number}_ptr", pointer(tensor_of(to).dtype), "data", to)
        scale = self._pointer(f"c{number}_scale_ptr", "*" + SCALES[quant.scale], "scale", to)
        self.body += [
            "acc = tl.where((rn < N)[None, :], acc, 0.0)",
            f"q = quantise_groups(acc, {scale}, rows * tl.cdiv(N, 128) + pn, live, {quant.scale == 'ue8m0'}, "
            f"{name}.dtype.element_ty)",
            f"tl.store({name} + rows[:, None] * N + rn[None, :], q, mask=keep)",
        ]
