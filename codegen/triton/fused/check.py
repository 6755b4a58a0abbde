"""Random problems of generated kernels, and what they must give: the IR's own evaluation of their ops, in float64.

The dims of such a problem are `T` tokens and, for rows sorted by expert, `LOAD`: which experts get them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.fused.binding import Generated, cache_of, tensor_of, width
from moec.codegen.triton.fused.products import Add, Bias, Product, Store, SwiGlu
from moec.codegen.triton.problem import MARK_FLOAT
from moec.codegen.triton.specs.recipe import BF16_ROUNDING, rounded_to_fp8
from moec.ir import CacheType, Module, Op, TensorType, Value, WeightRef
from moec.ir.expr import evaluate
from moec.ir.ops.core import swiglu
from moec.ir.types import TensorType as Tensors

if TYPE_CHECKING:
    import torch

    from moec.codegen.triton.problem import Expected, Problem

    Tensor = torch.Tensor

SEQUENCES, PAGES, PAGE = 2, 4, 64
INTEGERS = {
    ("embed", 0): "ids", ("rows.gather", 1): "rows", ("rope", 1): "pos", ("cache.append", 4): "seq",
    ("cache.append", 5): "pos", ("cache.append", 6): "pages", ("moe.combine", 1): "order", ("moe.weigh", 1): "order",
    ("cache.append_index", 3): "seq", ("cache.append_index", 4): "pos", ("cache.append_index", 5): "pages",
    ("cache.append_heads", 4): "seq", ("cache.append_heads", 5): "pos", ("cache.append_heads", 6): "pages",
}  # fmt: skip
"""What an integer operand means, by the op and position that read it."""


def symbols(tokens: int) -> dict[str, int]:
    """Values of the run-time symbols of a problem of so many tokens."""
    pages = SEQUENCES * PAGES + 1
    return {"T": tokens, "R": tokens, "S": tokens, "B": SEQUENCES, "N": PAGES, "P": pages, "C": PAGES * PAGE}


class _Filling:
    """The logical values of a problem's operands, each made once, and how they are stored."""

    def __init__(self, kernel: Generated, p: Problem) -> None:
        self.kernel, self.p, self.sizes = kernel, p, symbols(p.T)
        self.made: dict[object, Any] = {}
        self.layout: tuple[Tensor, Tensor] | None = None
        self.caches: dict[str, Tensor] = {}

    def operand(self, of: Value | WeightRef) -> Any:
        """Float64 values, integers, or a `Quantised`."""
        key = repr(of) if isinstance(of, WeightRef) else of
        if key not in self.made:
            self.made[key] = self._make(of)
        return self.made[key]

    def _make(self, of: Value | WeightRef) -> Any:
        import torch

        from moec.ir.numeric import TORCH, quantise

        t = tensor_of(of)
        shape = tuple(evaluate(str(d), self.sizes) for d in t.shape)
        product = self.kernel.product
        if product is not None and product.rows == "grouped" and of is product.a and not product.gathered:
            shape = (self.p.ROWS, *shape[1:])
        if any(op.name == "moe.weigh" and op.operands[0] is of for op in self.kernel.ops):
            # Rows that a dispatch names are fetched from the tokens.
            shape = (self.p.T, *shape[1:])
        if t.dtype == "i32":
            return self._integers(of, shape)
        x = self.p.normal(*shape)
        if len(shape) > 1 and isinstance(of, WeightRef):
            x *= shape[-1] ** -0.5
        elif len(shape) > 1 and shape[0] > 3 and shape[1] > 3:
            # A row of zeros, one with an outlier, one that float32 and E4M3 hold as subnormals.
            x[1] = 0.0
            x[2].view(-1)[3] = 3e4
            x[3] *= 1e-30
        if t.quant is not None:
            return quantise(x, t.dtype, t.quant.block, t.quant.scale)
        return x.to(TORCH[t.dtype]).to(torch.float64)

    def _integers(self, of: Value | WeightRef, shape: tuple[int, ...]) -> Tensor:
        import torch

        reads = [(op, i) for op in self.kernel.ops for i, o in enumerate(op.operands) if o is of]
        op, position = reads[0]
        tokens = torch.arange(shape[0])
        match INTEGERS[op.name, position]:
            case "ids":
                return self.p.integers(0, int(tensor_of(op.operands[1]).shape[0]), *shape)  # type: ignore[arg-type]
            case "rows":
                return self.p.integers(0, self.sizes["T"], *shape)
            case "pos":
                return (tokens // SEQUENCES * 5).to(torch.int32)
            case "seq":
                return (tokens % SEQUENCES).to(torch.int32)
            case "pages":
                return self.p.shuffled(SEQUENCES * PAGES + 1)[: SEQUENCES * PAGES].view(shape).to(torch.int32)
            case _:
                rows = evaluate(str(tensor_of(op.operands[0]).shape[0]), self.sizes)
                return self.p.shuffled(rows)[: shape[0] * shape[1]].view(shape).to(torch.int32)

    def cache(self, of: Value, what: str) -> Tensor:
        """A part of the cache, unwritten; the parts of a scaled one are views of one buffer."""
        import torch

        kind, rows = cache_of(of), self.sizes["P"] * PAGE
        if kind.quant is None:
            return self.p.output("cache_ptr", rows, int(kind.shape[3]))  # type: ignore[arg-type]
        if not self.caches:
            size, exact = int(kind.row_bytes()), 2 * kind.exact  # type: ignore[arg-type]
            latent = int(kind.shape[3]) - kind.exact  # type: ignore[arg-type]
            buffer = torch.full((rows, size), MARK_FLOAT, dtype=torch.uint8)
            scales = buffer[:, latent : size - exact]
            self.caches = {
                "cache": buffer[:, :latent].view(torch.float8_e4m3fn),
                "cache_scale": scales.view(torch.float32) if kind.quant.scale == "f32" else scales,
                "cache_exact": buffer[:, size - exact :].view(torch.bfloat16),
            }
        return self.caches[what]

    def experts(self) -> tuple[Tensor, Tensor]:
        """`blocks` and `source` of rows sorted by expert.

        LOAD 0 spreads the tokens, 1 gives all to one, 2 none, -1 gives even shares.
        """
        import torch

        if self.layout is None and self.kernel.product is not None and self.kernel.product.masked:
            full, owners = self.p.CAPACITY, self.p.E
            counts = {0: [1, 0, full], 1: [0, full], 2: [], -1: [full] * owners}[self.p.LOAD]
            used = torch.tensor([*counts, *[0] * (owners - len(counts))], dtype=torch.int32)
            self.layout = used, torch.empty(0, dtype=torch.int32)
        if self.layout is None:
            align, rows, load = self.p.ALIGN, self.p.ROWS, self.p.LOAD
            blocks = torch.full((rows // align,), -1, dtype=torch.int32)
            source = torch.full((rows,), -1, dtype=torch.int32)
            owners = int(tensor_of(self.kernel.product.b).shape[0])  # type: ignore[union-attr, arg-type]
            counts = {0: [1, 0, self.p.T - 1], 1: [0, self.p.T], 2: [], -1: [rows // owners] * owners}[load]
            at = 0
            for expert, count in enumerate(counts):
                source[at : at + count] = torch.arange(count)
                padded = -(-count // align)
                blocks[at // align : at // align + padded] = expert
                at += padded * align
            self.layout = blocks, source
        return self.layout


def build_generated(p: Problem, kernel: Generated) -> dict[str, Any]:
    """The arguments of a problem."""
    import torch

    fill = _Filling(kernel, p)
    kernel.problem = fill
    inside = {r for op in kernel.ops for r in op.results}
    rotated = {op.result: op.operands[0] for op in kernel.ops if op.name == "rope" and op.operands[0] not in inside}
    stored: dict[object, Tensor] = {}
    arguments: dict[str, Any] = {}
    for a in kernel.arguments:
        of = a.of
        if a.what == "size":
            known = {**fill.sizes, **({"CAPACITY": p.CAPACITY} if a.name == "capacity" else {})}
            arguments[a.name] = p.ROWS if a.name == "M" else evaluate(str(of), known)
        elif a.what in ("row", "head"):
            assert isinstance(of, Value)
            arguments[a.name] = width(of) if a.what == "row" else int(tensor_of(of).shape[-1])  # type: ignore[arg-type]
        elif a.what in ("blocks", "source"):
            arguments[a.name] = fill.experts()[0 if a.what == "blocks" else 1]
        elif a.what.startswith("cache"):
            assert isinstance(of, Value)
            arguments[a.name] = fill.cache(of, a.what)
        elif of in kernel.outputs and not (a.what == "data" and of in rotated):
            assert isinstance(of, Value)
            groups = -(-width(of) // 128)
            rows = p.ROWS if kernel.product is not None else evaluate(str(tensor_of(of).shape[0]), fill.sizes)
            arguments[a.name] = p.output(a.name, rows, groups if a.what == "scale" else width(of))
        else:
            assert isinstance(of, Value | WeightRef)
            # A rotation writes where it reads.
            source = rotated.get(of, of)  # type: ignore[arg-type]
            assert isinstance(source, Value | WeightRef)
            key = (a.what, repr(source) if isinstance(source, WeightRef) else source)
            if key not in stored:
                stored[key] = _stored(fill.operand(source), a.what, p.dtype(a.name), torch)
            arguments[a.name] = stored[key]
    return arguments


def _stored(value: Any, what: str, dtype: Any, torch: Any) -> Tensor:
    if what == "scale":
        bits = value.scale.float()
        stored = bits.view(torch.int32).bitwise_right_shift(23).to(torch.uint8) if dtype == torch.uint8 else bits
        return stored.contiguous()  # type: ignore[no-any-return]
    data = value if isinstance(value, torch.Tensor) else value.data
    return (data.view(torch.uint8) if dtype == torch.uint8 else data.to(dtype)).contiguous()  # type: ignore[no-any-return]


def reference_generated(p: Problem, x: dict[str, Any], kernel: Generated) -> dict[str, Expected]:
    """What every written argument must become."""
    fill = kernel.problem
    assert isinstance(fill, _Filling)
    names = {(a.what, a.of): a.name for a in kernel.arguments if isinstance(a.of, Value)}
    if kernel.product is not None:
        return _product(kernel.product, fill, names)
    return _rows(kernel, fill, names)


def _rows(kernel: Generated, fill: _Filling, names: dict[Any, str]) -> dict[str, Expected]:
    import torch

    from moec.ir.evaluate import Evaluator

    ctx = Evaluator(Module("check"), None, torch.float64, False)  # type: ignore[arg-type]
    env: dict[object, Any] = {}
    found: dict[str, Expected] = {}

    def value(operand: Value | WeightRef) -> Any:
        if operand in env:
            return env[operand]
        t = operand.type
        if isinstance(t, CacheType):
            return torch.zeros(1, fill.sizes["P"], PAGE, int(t.shape[3]), dtype=torch.float64)  # type: ignore[arg-type]
        return fill.operand(operand) if isinstance(t, Tensors) else 0

    for op in kernel.ops:
        inputs = [value(o) for o in op.operands]
        if op.name == "moe.weigh":
            inputs[0] = _dispatched(inputs[0], inputs[1])
        results = ctx._run(op, inputs)
        if op.name.startswith("cache.append"):
            found |= _cached(op, inputs[0][0].flatten(0, 1), _slots(op, value), names)
        for result, got in zip(op.results, results, strict=True):
            env[result] = got
            if result not in kernel.outputs:
                continue
            if op.name == "quant.cast":
                source = env[op.operands[0]] if op.operands[0] in env else value(op.operands[0])
                found |= _quantised(source.flatten(1), result, names)
                continue
            found[names["data", result]] = _bound(got.flatten(1), tensor_of(result))
            # What is stored is what the rest of the kernel sees.
            env[result] = _as_stored(got, tensor_of(result))
    return {n: _shaped(e, fill, kernel, n) for n, e in found.items()}


def _shaped(expected: Expected, fill: _Filling, kernel: Generated, name: str) -> Expected:
    """A rotation's argument keeps the shape of what it rotates."""
    from dataclasses import replace

    inside = {r for op in kernel.ops for r in op.results}
    for a in kernel.arguments:
        if (
            a.name == name
            and isinstance(a.of, Value)
            and any(op.name == "rope" and a.of is op.result and op.operands[0] not in inside for op in kernel.ops)
        ):
            shape = tuple(evaluate(str(d), fill.sizes) for d in tensor_of(a.of).shape)
            return replace(expected, value=expected.value.reshape(shape))
    return expected


def _dispatched(tokens: Tensor, order: Tensor) -> Tensor:
    """Rows of tokens where a dispatch's order puts them."""
    rows = tokens.new_zeros(order.numel(), tokens.shape[1])
    rows[order.flatten().long()] = tokens.repeat_interleave(order.shape[1], 0)
    return rows


def _cached(op: Op, cache: Tensor, slots: Tensor, names: dict[Any, str]) -> dict[str, Expected]:
    """What the rows of a cache must become."""
    import torch

    from moec.codegen.triton.problem import Expected

    written = torch.zeros(len(cache), 1, dtype=torch.bool)
    written[slots] = True
    kind, of = cache_of(op.operands[0]), op.operands[0]
    rounding = 2e-6 if kind.dtype == "f32" else BF16_ROUNDING * 1.001
    if kind.quant is None:
        columns = torch.arange(cache.shape[1])
        if op.name == "cache.append_index":
            written = written & (columns >= cache.shape[1] - width(op.operands[2]))
        elif op.name == "cache.append":
            written = written & (columns < width(op.operands[2]) + width(op.operands[3]))
        return {names["cache", of]: Expected(cache, rounding, 2e-6, where=written)}
    latent, exact = cache[:, : -kind.exact], cache[:, -kind.exact :]
    power = kind.quant.scale == "ue8m0"
    names_of = names["cache", of], names["cache_scale", of]
    return {
        **rounded_to_fp8(latent, *names_of, pow2=power, as_bytes=power, where=written, gpu_slack=1e-2),
        names["cache_exact", of]: Expected(exact, BF16_ROUNDING * 1.001, 2e-6, where=written),
    }


def _slots(op: Op, value: Any) -> Any:
    seq, pos, pages = (value(o) for o in op.operands[-3:])
    return pages[seq.long(), pos.long() // PAGE].long() * PAGE + pos.long() % PAGE


def _product(product: Product, fill: _Filling, names: dict[Any, str]) -> dict[str, Expected]:
    import torch

    from moec.ir.numeric import logical

    a, b = (logical(fill.operand(o), torch.float64) for o in (product.a, product.b))
    where = None
    if product.rows == "grouped":
        blocks, source = fill.experts()
        if product.masked:
            row = torch.arange(fill.p.ROWS)
            expert = row // fill.p.CAPACITY
            where = (row % fill.p.CAPACITY < blocks[expert])[:, None]
        else:
            expert = blocks.repeat_interleave(fill.p.ALIGN).long()
            where = (expert >= 0)[:, None]
        rows = a[source.clamp(min=0).long()] if product.gathered else a
        value = rows.new_zeros(len(rows), b.shape[1])
        for one in sorted(set(expert.clamp(min=0).tolist())):
            value[expert == one] = rows[expert == one] @ b[one].T
    elif product.rows == "heads":
        if product.part is not None:
            start, stop, rows_ = product.part
            b = b.reshape(-1, rows_, b.shape[-1])[:, start:stop]
        value = torch.einsum("thk,hkn->thn" if product.transposed else "thk,hnk->thn", a, b)
    else:
        value = a @ b.T
    found: dict[str, Expected] = {}
    for step in product.steps:
        match step:
            case SwiGlu():
                value = swiglu(value, torch, {n: v for n, v in vars(step).items() if n != "limit" or v})
            case Bias(of):
                added = fill.operand(of)
                value = value + (added[expert.clamp(min=0)] if product.rows == "grouped" else added)
            case Add(of):
                value = value + fill.operand(of)
            case Store(to):
                t = tensor_of(to)
                if t.quant is not None:
                    found |= _quantised(value, to, names, where)
                else:
                    found[names["data", to]] = _bound(value.flatten(1), t, where)
                    value = _as_stored(value, t)
    return found


def _bound(value: Tensor, t: TensorType, where: Tensor | None = None) -> Expected:
    from moec.codegen.triton.problem import Expected

    return Expected(value, BF16_ROUNDING * 1.001 if t.dtype == "bf16" else 2e-6, 3e-6, 5e-3, where=where)


def _quantised(value: Tensor, to: Value, names: dict[Any, str], where: Tensor | None = None) -> dict[str, Expected]:
    quant = tensor_of(to).quant
    assert quant is not None
    power = quant.scale == "ue8m0"
    return rounded_to_fp8(
        value, names["data", to], names["scale", to], pow2=power, as_bytes=power, where=where, gpu_slack=1e-2
    )


def _as_stored(value: Tensor, t: TensorType) -> Tensor:
    from moec.ir.numeric import TORCH

    return value.to(TORCH[t.dtype]).to(value.dtype)
