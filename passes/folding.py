"""Folding of absorbed projections: W_UQ by W_UK and W_UV by W_O multiplied ahead of time, where that costs less.

A folded product replaces two. It loses the block scales of quantised weights, and for large ranks it is far larger than
both: 25 G parameters more for DeepSeek-V3.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Function, Module, Op, TensorType, Value, WeightRef
from moec.ir.builder import weight_ref
from moec.ir.rewrite import append_to_program, combine_weights, derive_weight, fresh_names, remove_dead, replace_values
from moec.passes.base import Context, Edit
from moec.targets.cost import op_time

Steps = list[tuple[str, dict[str, object]]]


@dataclass(frozen=True)
class Fold:
    """One of both folds of a layer: what multiplying ahead adds, and what a step takes folded and apart.

    heads, inner: the product per head that disappears. parameters: added to those that a step reads, negative where
    the fold is smaller. lossy: scales of quantised weights would be lost. chain: the ops that are replaced.
    """

    name: str
    side: str
    heads: int
    inner: int
    parameters: int
    folded_us: float
    apart_us: float
    lossy: bool
    chain: tuple[Op, ...]

    @property
    def wins(self) -> bool:
        """Whether it takes less time, keeps what the checkpoint's scales say, and reads no more parameters."""
        return self.folded_us < self.apart_us and not self.lossy and self.parameters <= 0

    def verdict(self, wanted: str) -> str:
        """What is done, and why not."""
        if wanted == "always":
            return "folded, as asked"
        if wanted == "never":
            return "not folded, as asked"
        if self.wins:
            return "folded"
        if self.lossy:
            return "not folded: block scales would be lost"
        if self.folded_us >= self.apart_us:
            return "not folded"
        return "not folded: faster, but larger"

    def __str__(self) -> str:
        more = f"{self.parameters / 1e6:+.4g} M parameters a layer"
        return f"{self.name} {more}, {self.folded_us:.0f} us instead of {self.apart_us:.0f}"


def folds(module: Module, function: Function, site: Op, tokens: int, ctx: Context) -> list[Fold]:
    """The folds that the ops around an `attn.mla_absorbed` allow; `tokens` of a step."""
    found = [_query(module, function, site, tokens, ctx), _output(module, function, site, tokens, ctx)]
    return [f for f in found if f is not None]


def _query(module: Module, function: Function, site: Op, tokens: int, ctx: Context) -> Fold | None:
    producer, uses = function.producer(), function.uses()
    heads_op = producer[site.operands[0]]  # type: ignore[index]
    split = producer.get(heads_op.operands[0])  # type: ignore[arg-type]
    rope = _before(producer, uses, split, "rope")
    unflatten = _before(producer, uses, rope, "unflatten")
    query = _before(producer, uses, unflatten, "linear")
    if split is None or rope is None or unflatten is None or query is None or not _weighs(query):
        return None
    heads, rank, nope = _shape(heads_op.operands[1])
    if int(rope.attrs["offset"]) != nope or split.attrs["sizes"] != (nope, _shape(rope.result)[2] - nope):  # type: ignore[arg-type]
        return None
    q_rank = _shape(query.operands[1])[1]
    folded = _gemm(ctx, tokens, heads * rank, q_rank)
    apart = _gemm(ctx, tokens, heads * nope, q_rank) + _per_head(ctx, heads, tokens, rank, nope)
    extra = heads * (q_rank * rank - nope * (q_rank + rank))
    lossy = _quantised(module, query, heads_op)
    chain = (query, unflatten, rope, split, heads_op)
    return Fold("W_UQ·W_UK", "query", heads, nope, extra, folded, apart, lossy, chain)


def _output(module: Module, function: Function, site: Op, tokens: int, ctx: Context) -> Fold | None:
    uses = function.uses()
    heads_op = next(op for op in uses[site.result] if op.name == "linear.heads")
    flatten = _after(uses, heads_op, "flatten")
    output = _after(uses, flatten, "linear")
    if flatten is None or output is None or not _weighs(output) or len(uses[site.result]) != 1:
        return None
    heads, v, rank = _shape(heads_op.operands[1])
    hidden = _shape(output.operands[1])[0]
    folded = _gemm(ctx, tokens, hidden, heads * rank)
    apart = _gemm(ctx, tokens, hidden, heads * v) + _per_head(ctx, heads, tokens, v, rank)
    extra = heads * (rank * hidden - v * (rank + hidden))
    lossy = _quantised(module, output, heads_op)
    return Fold("W_UV·W_O", "output", heads, v, extra, folded, apart, lossy, (heads_op, flatten, output))


def apply(module: Module, function: Function, fold: Fold, edit: Edit) -> None:
    """Replace the ops of a fold by a product with the folded weight, declared beside the others."""
    (_fold_query if fold.side == "query" else _fold_output)(module, fold, edit)
    remove_dead(function)
    fresh_names(function)


def _fold_query(module: Module, fold: Fold, edit: Edit) -> None:
    query, _, rope, split, heads_op = fold.chain
    x, ref, up = query.operands[0], query.operands[1], heads_op.operands[1]
    assert isinstance(ref, WeightRef) and isinstance(up, WeightRef)
    (rows, q_rank), heads, nope = _shape(ref), fold.heads, fold.inner
    width, rank = rows // heads, _shape(up)[1]
    by_head: Steps = [*_plain(module, ref), ("weight.reshape", {"shape": (heads, width, q_rank)})]

    def cut(start: int, stop: int) -> Steps:
        return [*by_head, ("weight.slice", {"axis": 1, "start": start, "stop": stop})]

    names = f"{ref.name}.folded", f"{ref.name}.rope"
    if names[0] not in module.weights:
        inner = derive_weight(f"{ref.name}.nope", module.weights[ref.name], cut(0, nope))
        whole = derive_weight(up.name, module.weights[up.name], _plain(module, up))
        folded = combine_weights(names[0], [whole, inner], "weight.matmul", {})
        append_to_program(folded, "weight.reshape", shape=(heads * rank, q_rank))
        module.weights[names[0]] = folded
        steps: Steps = [*cut(nope, width), ("weight.reshape", {"shape": (heads * (width - nope), q_rank)})]
        module.weights[names[1]] = derive_weight(names[1], module.weights[ref.name], steps)
    latent, rotary = (weight_ref(module.weights[n], ref.indices) for n in names)
    out = {"out": query.attrs["out"]} if "out" in query.attrs else {}
    (wide,) = edit.insert(query, "linear", x, latent, attrs=out)
    (q_latent,) = edit.insert(query, "unflatten", wide, attrs={"sizes": (heads, rank)})
    (narrow,) = edit.insert(query, "linear", x, rotary, attrs=out)
    (by_heads,) = edit.insert(query, "unflatten", narrow, attrs={"sizes": (heads, width - nope)})
    (turned,) = edit.insert(rope, "rope", by_heads, *rope.operands[1:], attrs={**rope.attrs, "offset": 0})
    replace_values(edit.function, {heads_op.result: q_latent, split.results[1]: turned})


def _fold_output(module: Module, fold: Fold, edit: Edit) -> None:
    heads_op, flatten, output = fold.chain
    ref, up = output.operands[1], heads_op.operands[1]
    assert isinstance(ref, WeightRef) and isinstance(up, WeightRef)
    hidden, heads, v = _shape(ref)[0], fold.heads, fold.inner
    rank = _shape(up)[2]
    name = f"{ref.name}.folded"
    if name not in module.weights:
        turn: dict[str, object] = {"perm": (1, 0, 2)}
        steps: Steps = [*_plain(module, ref), ("weight.reshape", {"shape": (hidden, heads, v)})]
        steps.append(("weight.transpose", turn))
        outer = derive_weight(f"{ref.name}.heads", module.weights[ref.name], steps)
        whole = derive_weight(up.name, module.weights[up.name], _plain(module, up))
        folded = combine_weights(name, [outer, whole], "weight.matmul", {})
        append_to_program(folded, "weight.transpose", **turn)
        append_to_program(folded, "weight.reshape", shape=(hidden, heads * rank))
        module.weights[name] = folded
    (flat,) = edit.insert(flatten, "flatten", heads_op.operands[0])
    output.operands[:2] = [flat, weight_ref(module.weights[name], ref.indices)]


def _plain(module: Module, ref: WeightRef) -> Steps:
    t = module.weights[ref.name].type
    assert isinstance(t, TensorType)
    return [("weight.dequant", {"dtype": "f32"})] if t.quant is not None else []


def _quantised(module: Module, *ops: Op) -> bool:
    types = [module.weights[op.operands[1].name].type for op in ops if isinstance(op.operands[1], WeightRef)]
    return any(isinstance(t, TensorType) and t.quant is not None for t in types)


def _weighs(op: Op) -> bool:
    """Whether a `linear` multiplies by a weight and adds no bias."""
    return len(op.operands) == 2 and isinstance(op.operands[1], WeightRef)


def _before(producer: dict[Value, Op], uses: dict[Value, list[Op]], op: Op | None, name: str) -> Op | None:
    """The op `name` that alone feeds `op`."""
    source = op.operands[0] if op is not None else None
    found = producer.get(source) if isinstance(source, Value) else None
    return found if found is not None and found.name == name and len(uses[found.result]) == 1 else None


def _after(uses: dict[Value, list[Op]], op: Op | None, name: str) -> Op | None:
    """The op `name` that alone reads `op`."""
    found = uses.get(op.result, []) if op is not None else []
    return found[0] if len(found) == 1 and found[0].name == name else None


def _gemm(ctx: Context, m: int, n: int, k: int) -> float:
    return op_time({"op": "gemm", "m": m, "n": n, "k": k, "dtype": "bf16"}, ctx.target).time_us


def _per_head(ctx: Context, heads: int, m: int, n: int, k: int) -> float:
    row = {"op": "grouped_gemm", "groups": heads, "m_per_group": m, "n": n, "k": k, "dtype": "bf16"}
    return op_time({**row, "layout": "masked"}, ctx.target).time_us


def _shape(operand: object) -> tuple[int, ...]:
    t = getattr(operand, "type", None)
    assert isinstance(t, TensorType)
    return tuple(d if isinstance(d, int) else 0 for d in t.shape)
