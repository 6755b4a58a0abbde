"""Tensor parallelism: heads, widths and vocabulary cut over the ranks of `tp` (arXiv 1909.08053)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moec.ir import CacheType, Function, Module, Op, TensorType, Value, Weight
from moec.ir.mesh import Mesh
from moec.ir.module import Attribute
from moec.ir.patterns import Pattern, match, matches
from moec.ir.rewrite import append_to_program
from moec.passes.base import Outcome, PassError
from moec.passes.planning.layout import check_blocks, padded_width
from moec.passes.planning.sharding import key_heads, roles, routed_region
from moec.passes.sharding.edit import PASS, behind, cut_weight, insert, use_instead, weight_at

FEED_FORWARD = Pattern("linear", (Pattern("swiglu", (Pattern("linear", bind="up"),), alone=True),))
TWO_SUMS = Pattern(
    "add", (Pattern("comm.all_reduce", bind="a", alone=True), Pattern("comm.all_reduce", bind="b", alone=True))
)


@dataclass(frozen=True)
class Widths:
    """Scale blocks along the widths that are cut, and whether widths may be filled up to whole ones."""

    block: int = 1
    pad: bool = False

    def fit(self, weight: Weight, dim: int, parts: int, tp: int, out: Outcome) -> None:
        """Make dim `dim` of a weight divide, of each of `parts` joined tensors. Raises CutBlock where it may not."""
        assert isinstance(weight.type, TensorType)
        if any(op.name in ("weight.shard", "weight.pad") for op in weight.program.ops):
            return
        width = int(weight.type.shape[dim]) // parts  # type: ignore[arg-type]
        if not self.pad:
            check_blocks(weight.name, width, tp, self.block)
        padded = padded_width(width, tp, self.block)
        if padded != width:
            attrs: dict[str, object] = {"dim": dim, "size": padded, **({"parts": parts} if parts > 1 else {})}
            append_to_program(weight, "weight.pad", **attrs)
            out.notes.append(f"@{weight.name}: width {width} filled up with zeros to {padded}")


def cut_layers(module: Module, function: Function, mesh: Mesh, widths: Widths, out: Outcome) -> int:
    """Cut attention and feed-forwards of a layer function; returns how many products were cut."""
    if mesh.tp == 1:
        return 0
    found: dict[int, str] = dict(roles(function))
    keys = key_heads(function)
    routed = any(op.name == "moe.dispatch" for op in function.ops)
    if routed and mesh.ep == 1:
        _feed_forwards(function, found)
    count = 0
    for op in list(function.ops):
        match found[id(op)]:
            case "column" if op.name == "linear":
                copies = mesh.tp // min(mesh.tp, keys.get(id(op), mesh.tp))
                count += _column(module, function, op, mesh, widths, out, copies)
            case "row" if op.name == "linear":
                count += _row(module, function, op, mesh, widths, out)
            case "heads" if op.name == "unflatten":
                sizes = op.attrs["sizes"]
                assert isinstance(sizes, tuple) and isinstance(sizes[0], int)
                op.attrs["sizes"] = (max(1, sizes[0] // mesh.tp), *sizes[1:])
            case "heads" if op.name == "attn.heads":
                op.attrs["kv_heads"] = max(1, int(op.attrs["kv_heads"]) // mesh.tp)  # type: ignore[arg-type]
                sinks = weight_at(module, op, 6)
                if sinks is not None:
                    cut_weight(sinks, mesh, "tp", 0)
            case "heads" if op.name == "linear.heads":
                weight = weight_at(module, op, 1)
                if weight is not None:
                    cut_weight(weight, mesh, "tp", 0)
                    count += 1
    attention = [op for op in function.ops if op.name.startswith("attn.")]
    if attention and any(found[id(op)] != "heads" for op in attention):
        out.notes.append(f"@{function.name}: attention is whole on every rank of a tensor-parallel group")
    if routed:
        if mesh.ep == 1:
            count += _cut_experts(module, function, mesh, widths, out)
        else:
            count += _divide_tokens(module, function, mesh)
    _join_sums(module, function, mesh)
    return count


def narrow_cache(module: Module, mesh: Mesh, before: Mapping[str, int]) -> None:
    """Make the cache of grouped heads as wide as a rank's heads; `before` has the heads of each function until now."""
    if mesh.tp == 1:
        return
    heads = heads_of_keys(module)
    widths = {(before[name], heads[name]) for name in before}
    if not widths or all(old == new for old, new in widths):
        return
    if len({new / old for old, new in widths}) > 1:
        raise PassError(name=PASS, message="layers cut their heads of keys and values differently; choose --tp 1")
    ((old, new), *_) = sorted(widths)
    for function in module.functions.values():
        for arg in function.args:
            if isinstance(arg.type, CacheType) and arg.type.kind == "kv.heads":
                width = int(arg.type.shape[-1]) * new // old  # type: ignore[arg-type]
                arg.type = replace(arg.type, shape=(*arg.type.shape[:-1], width))


def heads_of_keys(module: Module) -> dict[str, int]:
    """Heads of keys and values of each layer function with grouped heads."""
    return {
        f.name: int(op.attrs["kv_heads"])  # type: ignore[arg-type]
        for f, op in module.ops()
        if op.name == "attn.heads"
    }


def _feed_forwards(function: Function, found: dict[int, str]) -> None:
    """Roles of shared experts, as those of dense feed-forwards."""
    for down, bound in matches(function, FEED_FORWARD):
        found[id(bound["up"])], found[id(down)] = "column", "row"


def _column(
    module: Module, function: Function, op: Op, mesh: Mesh, widths: Widths, out: Outcome, copies: int = 1
) -> bool:
    """Cut the output columns of a product; of gate and up, which lie in one weight, each.

    `copies` ranks have the same columns: fewer heads of keys and values than ranks.
    """
    weight = weight_at(module, op, 1)
    if weight is None:
        return False
    joined = any(user.name == "swiglu" for user in function.uses().get(op.result, []))
    if joined:
        widths.fit(weight, 0, 2, mesh.tp, out)
    cut_weight(weight, mesh, "tp", 0, 2 if joined else 1, copies)
    bias = weight_at(module, op, 2)
    if bias is not None:
        if joined:
            widths.fit(bias, 0, 2, mesh.tp, out)
        cut_weight(bias, mesh, "tp", 0, 2 if joined else 1, copies)
    return True


def _row(module: Module, function: Function, op: Op, mesh: Mesh, widths: Widths, out: Outcome) -> bool:
    """Cut the summed width of a product, and sum over the ranks."""
    weight = weight_at(module, op, 1)
    if weight is None:
        return False
    source = function.producer().get(op.operands[0]) if isinstance(op.operands[0], Value) else None
    if source is not None and source.name == "swiglu":
        widths.fit(weight, 1, 1, mesh.tp, out)
    cut_weight(weight, mesh, "tp", 1)
    bias = weight_at(module, op, 2)
    if bias is not None and not any(o.name == "weight.once" for o in bias.program.ops):
        append_to_program(bias, "weight.once", axis="tp")
    behind(module, function, op.result, "comm.all_reduce", {"axis": "tp", "ranks": mesh.tp})
    return True


def _cut_experts(module: Module, function: Function, mesh: Mesh, widths: Widths, out: Outcome) -> int:
    """Every rank computes a part of every expert's width; the sum follows the combination."""
    count = 0
    for op in [o for o in function.ops if o.name == "moe.experts"]:
        up, down = weight_at(module, op, 2), weight_at(module, op, 3)
        if up is not None and down is not None:
            if len(op.operands) > 4:
                message = f"@{function.name}: experts with biases are not cut by width; choose --ep {mesh.tp}"
                raise PassError(name=PASS, message=message)
            widths.fit(up, 0, 2, mesh.tp, out)
            widths.fit(down, 1, 1, mesh.tp, out)
            cut_weight(up, mesh, "tp", 0, 2)
            cut_weight(down, mesh, "tp", 1)
            count += 1
    for op in [o for o in function.ops if o.name == "moe.combine"]:
        behind(module, function, op.result, "comm.all_reduce", {"axis": "tp", "ranks": mesh.tp})
    return count


def _divide_tokens(module: Module, function: Function, mesh: Mesh) -> int:
    """Each rank of a group routes and dispatches its part of the tokens; the results of all are gathered behind."""
    attrs: dict[str, Attribute] = {"axis": "tp", "ranks": mesh.tp}
    count = 0
    for dispatch in [o for o in function.ops if o.name == "moe.dispatch"]:
        x = dispatch.operands[0]
        assert isinstance(x, Value)
        region = routed_region(function, dispatch)
        position = min(i for i, op in enumerate(function.ops) if op in region)
        rows = insert(module, function, position, "comm.rows", [x], {**attrs, "rows": "U"})
        for op in region:
            op.operands = [rows.result if o is x else o for o in op.operands]
        inside = {r for op in region for r in op.results}
        outside = [op for op in function.ops if op not in region]
        leaving = [v for v in inside if v in function.returns or any(v in op.operands for op in outside)]
        for value in leaving:
            producer = function.producer()[value]
            gather = insert(
                module, function, function.ops.index(producer) + 1, "comm.all_gather", [value],
                {**attrs, "dim": 0, "rows": "T"},
            )  # fmt: skip
            for op in outside:
                op.operands = [gather.result if o is value else o for o in op.operands]
            function.returns = [gather.result if v is value else v for v in function.returns]
        count += 1
    return count


def _join_sums(module: Module, function: Function, mesh: Mesh) -> None:
    """`all_reduce(a) + all_reduce(b)` becomes `all_reduce(a + b)`: one message instead of two."""
    for op in [o for o in function.ops if o.name == "add"]:
        if sums := match(function, op, TWO_SUMS):
            op.operands = [sums[side].operands[0] for side in ("a", "b")]
            function.ops = [o for o in function.ops if o not in sums.values()]
            behind(module, function, op.result, "comm.all_reduce", {"axis": "tp", "ranks": mesh.tp})


def cut_head(module: Module, mesh: Mesh, out: Outcome) -> int:
    """Cut the output head by vocabulary where it divides; every rank then gets all logits."""
    if mesh.tp == 1:
        return 0
    called = {str(op.attrs["func"]) for _, op in module.ops() if op.name == "repeat"}
    count = 0
    for function in [f for f in module.functions.values() if f.name not in called]:
        made = function.producer()
        for value in function.returns:
            op = made.get(value)
            weight = weight_at(module, op, 1) if op is not None and op.name == "linear" else None
            if op is None or weight is None or len(op.operands) > 2:
                continue
            assert isinstance(weight.type, TensorType)
            cut = any(o.name == "weight.shard" for o in weight.program.ops)
            vocabulary = int(weight.type.shape[0])  # type: ignore[arg-type]
            if not cut and vocabulary % mesh.tp:
                out.notes.append(
                    f"@{weight.name} is whole on every rank: {vocabulary} rows do not divide by TP {mesh.tp}"
                )
                continue
            cut_weight(weight, mesh, "tp", 0)
            # The result's type follows when the module is typed again.
            gathered = behind(module, function, value, "comm.all_gather", {"axis": "tp", "ranks": mesh.tp, "dim": 1})
            use_instead(function, value, gathered, except_for=function.producer()[gathered])
            count += 1
    return count
