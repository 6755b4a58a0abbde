"""Split a phase into micro-batches: every op once for each part of the batch, in one function."""

from __future__ import annotations

from dataclasses import replace

from moec.ir import CacheType, Dim, Function, Module, Op, TensorType, Type, Value, WeightRef
from moec.ir.issue import CALLS
from moec.ir.module import Attribute, Operand
from moec.ir.optable import OPS, infer
from moec.ir.rewrite import fresh_names

SHARED = ("N", "C")
"""Symbols that all micro-batches share: pages of a sequence, greatest context."""


def split_entry(module: Module, entry: Function, count: int, prompt_parts: tuple[int, ...] = ()) -> None:
    """Split the entry and the layer functions that it calls into `count` micro-batches, in place.

    An argument `%x: bf16[T, 8]` becomes `%x_0: bf16[T0, 8]`, `%x_1: bf16[T1, 8]`, ...; caches and what has no
    symbolic dim stay one. Every op of part k carries `micro_batch = k`. How a batch is divided is the caller's
    choice: parts may differ in tokens and sequences. Results come as one a part. With `prompt_parts`, tokens of each
    part for the longest prompt, the parts are those of every sequence's new tokens, in this order: a later one reads
    what an earlier one leaves in the cache.
    """
    marks: dict[str, Attribute] = {"micro_batches": count}
    if prompt_parts:
        marks["prompt_parts"] = prompt_parts
    done: dict[str, None] = {}
    for op in entry.ops:
        name = str(op.attrs.get("func"))
        if op.name in CALLS and name not in done:
            done[name] = None
            module.functions[name] = _split(module, module.functions[name], count, marks)
    module.functions[entry.name] = _split(module, entry, count, marks)
    # A caller must stand below what it calls.
    module.functions[entry.name] = module.functions.pop(entry.name)


def _split(module: Module, function: Function, count: int, marks: dict[str, Attribute]) -> Function:
    kept = {s for a in function.args if isinstance(a.type, CacheType) for s in a.type.symbols()} | set(SHARED)
    values = [*function.args, *(r for op in function.ops for r in op.results)]
    own = {s for v in values for s in v.type.symbols()} - kept
    out = Function(function.name, [], attrs={**function.attrs, **marks})
    env: list[dict[Value, Value]] = [{} for _ in range(count)]
    for arg in function.args:
        parts = _parts(arg.type, count, kept)
        names = [f"{arg.name}_{k}" for k in range(count)] if len(parts) > 1 else [arg.name]
        values = [Value(name, t) for name, t in zip(names, parts, strict=True)]
        out.args += values
        for k in range(count):
            env[k][arg] = values[k % len(values)]
    for op in function.ops:
        if op.name in CALLS:
            out.ops.append(_call(module, op, env))
            continue
        for k in range(count):
            out.ops.append(_copy(module, op, env[k], k, own))
    out.ops = _by_part(out.ops)
    out.returns = [env[k][v] for v in function.returns for k in range(count)]
    fresh_names(out)
    return out


def _parts(t: Type, count: int, kept: set[str]) -> list[Type]:
    """The type once for each part, or alone when it does not depend on the batch."""
    if not isinstance(t, TensorType) or not t.symbols() - kept:
        return [t]
    return [_renamed(t, k, kept) for k in range(count)]


def _renamed(t: TensorType, k: int, kept: set[str]) -> TensorType:
    names = {s: f"{s}{k}" for s in t.symbols() - kept}
    return replace(t, shape=tuple(d.renamed(names) if isinstance(d, Dim) else d for d in t.shape))


def _mapped(operand: Operand, env: dict[Value, Value]) -> Operand:
    if isinstance(operand, Value):
        return env[operand]
    return WeightRef(operand.name, tuple(env[i] for i in operand.indices), operand.type)


def _copy(module: Module, op: Op, env: dict[Value, Value], k: int, own: set[str]) -> Op:
    operands = [_mapped(o, env) for o in op.operands]
    attrs: dict[str, Attribute] = {n: _attribute(v, k, own) for n, v in op.attrs.items()} | {"micro_batch": k}
    types = infer(OPS[op.name], operands, attrs, module)
    results = [Value(r.name, t) for r, t in zip(op.results, types, strict=True)]
    env.update(zip(op.results, results, strict=True))
    return Op(op.name, operands, attrs, results, op.loc)


def _attribute(value: Attribute, k: int, own: set[str]) -> Attribute:
    """Attributes that name a symbol (`length = S`) follow it."""
    return f"{value}{k}" if isinstance(value, str) and value in own else value


def _call(module: Module, op: Op, env: list[dict[Value, Value]]) -> Op:
    """One call for all parts: split operands one after the other, shared ones once."""
    operands: list[Operand] = []
    for operand in op.operands:
        operands += dict.fromkeys(_mapped(operand, e) for e in env) if isinstance(operand, Value) else [operand]
    types = infer(OPS[op.name], operands, op.attrs, module)
    results = [Value("r", t) for t in types]
    for i, r in enumerate(op.results):
        for k, e in enumerate(env):
            e[r] = results[i * len(env) + k]
    return Op(op.name, operands, dict(op.attrs), results, op.loc)


def _by_part(ops: list[Op]) -> list[Op]:
    """The ops between two calls part by part, as they are easier to read and to follow."""
    out: list[Op] = []
    run: list[Op] = []
    for op in [*ops, None]:
        if op is not None and op.name not in CALLS:
            run.append(op)
            continue
        out += sorted(run, key=lambda o: int(str(o.attrs["micro_batch"])))
        run = []
        if op is not None:
            out.append(op)
    return out
