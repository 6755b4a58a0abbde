"""Editing modules: copies, replaced values, dead code, common subexpressions, re-inferred types, weight programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from moec.ir.issue import CALLS
from moec.ir.module import ENTRIES, Attribute, Function, Module, Op, Operand, Value, Weight, WeightRef
from moec.ir.optable import OPS, infer


def clone_function(function: Function, name: str | None = None) -> Function:
    """A deep copy whose values are fresh objects with the same names."""
    fresh: dict[Value, Value] = {}

    def copy(value: Value) -> Value:
        return fresh.setdefault(value, Value(value.name, value.type))

    args = [copy(a) for a in function.args]
    ops = []
    for op in function.ops:
        operands = [map_operand(o, copy) for o in op.operands]
        ops.append(Op(op.name, operands, dict(op.attrs), [copy(r) for r in op.results], op.loc))
    returns = [copy(v) for v in function.returns]
    return Function(name or function.name, args, ops, returns, dict(function.attrs))


def clone_module(module: Module) -> Module:
    """A deep copy of a module."""
    weights = {n: replace(w, program=clone_function(w.program)) for n, w in module.weights.items()}
    functions = {n: clone_function(f) for n, f in module.functions.items()}
    return Module(module.name, dict(module.attrs), weights, functions)


def map_operand(operand: Operand, change: Callable[[Value], Value]) -> Operand:
    """The operand with every value in it changed."""
    if isinstance(operand, Value):
        return change(operand)
    return WeightRef(operand.name, tuple(change(i) for i in operand.indices), operand.type)


def replace_values(function: Function, new: Mapping[Value, Value]) -> None:
    """Use `new[v]` in place of `v` in every op and return."""

    def change(value: Value) -> Value:
        while value in new:
            value = new[value]
        return value

    for op in function.ops:
        op.operands = [map_operand(o, change) for o in op.operands]
    function.returns = [change(v) for v in function.returns]


def fresh_names(function: Function) -> None:
    """Rename results to 0, 1, 2, ... in order; arguments keep their names."""
    taken = {a.name for a in function.args}
    count = 0
    for op in function.ops:
        for result in op.results:
            while str(count) in taken:
                count += 1
            result.name = str(count)
            count += 1


def remove_dead(function: Function) -> int:
    """Drop pure ops whose results nobody uses; returns how many."""
    live = set(function.returns)
    kept: list[Op] = []
    for op in reversed(function.ops):
        if OPS[op.name].effect == "write" or any(r in live for r in op.results):
            live.update(op.values())
            kept.append(op)
    removed = len(function.ops) - len(kept)
    function.ops = kept[::-1]
    return removed


def merge_equal(function: Function) -> int:
    """Common subexpressions: a pure op equal to an earlier one takes its results; returns how many went."""
    seen: dict[object, Op] = {}
    new: dict[Value, Value] = {}
    kept: list[Op] = []

    def now(value: Value) -> Value:
        return new.get(value, value)

    for op in function.ops:
        op.operands = [map_operand(o, now) for o in op.operands]
        key = (op.name, tuple(op.operands), tuple(op.attrs.items()))
        if not OPS[op.name].effect and key in seen:
            new.update(zip(op.results, seen[key].results, strict=True))
            continue
        if not OPS[op.name].effect:
            seen[key] = op
        kept.append(op)
    removed = len(function.ops) - len(kept)
    function.ops = kept
    replace_values(function, new)
    return removed


def remove_unused(module: Module, entries: Iterable[str] = ENTRIES) -> int:
    """Drop functions that no entry reaches and weights that nothing uses; returns how many went."""
    reached: set[str] = set()
    pending = [e for e in entries if e in module.functions]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += [str(op.attrs["func"]) for op in module.functions[name].ops if op.name in CALLS]
    before = len(module.functions) + len(module.weights)
    module.functions = {n: f for n, f in module.functions.items() if n in reached}
    used = {o.name for _, op in module.ops() for o in op.operands if isinstance(o, WeightRef)}
    module.weights = {n: w for n, w in module.weights.items() if n in used}
    return before - len(module.functions) - len(module.weights)


def retype(module: Module) -> None:
    """Infer every type again, in place, after argument or weight types changed; raises TypeRuleError.

    Functions are taken in order, callees first; the arguments of a layer function take the types of its `repeat`.
    """
    from moec.ir.builder import weight_ref

    for weight in module.weights.values():
        _infer_function(module, weight.program, set())
        weight.type = weight.program.returns[0].type

    done: set[Function] = set()

    def fix(operand: Operand) -> Operand:
        return weight_ref(module.weights[operand.name], operand.indices) if isinstance(operand, WeightRef) else operand

    for function in module.functions.values():
        for op in function.ops:
            op.operands = [fix(o) for o in op.operands]
        _infer_function(module, function, done)


def _infer_function(module: Module, function: Function, done: set[Function]) -> None:
    """`done` holds the functions whose types follow from their arguments' by now."""
    done.add(function)
    for op in function.ops:
        if op.name == "repeat" and str(op.attrs["func"]) in module.functions:
            callee = module.functions[str(op.attrs["func"])]
            given = [o.type for o in op.operands]
            if callee not in done or given != [a.type for a in callee.args[1:]]:
                for arg, t in zip(callee.args[1:], given, strict=True):
                    assert t is not None
                    arg.type = t
                _infer_function(module, callee, done)
        for result, t in zip(op.results, infer(OPS[op.name], op.operands, op.attrs, module), strict=True):
            result.type = t


def append_to_program(weight: Weight, op: str, **attrs: object) -> None:
    """Add one op behind the result of a weight's program and take its type as the weight's."""
    program = weight.program
    (result,) = program.returns
    (type_,) = infer(OPS[op], [result], dict(attrs), None)
    out = Value(str(sum(len(o.results) for o in program.ops)), type_)
    program.ops.append(Op(op, [result], dict(attrs), [out]))  # type: ignore[arg-type]
    program.returns = [out]
    weight.type = type_


def join_weights(name: str, parts: Sequence[Weight], axis: int) -> Weight:
    """A weight whose program runs the programs of `parts`, all of one index range, and concatenates their results."""
    return combine_weights(name, parts, "weight.concat", {"axis": axis})


def combine_weights(name: str, parts: Sequence[Weight], op: str, attrs: Mapping[str, Attribute]) -> Weight:
    """A weight whose program runs the programs of `parts`, all of one index range, and joins their results by `op`."""
    first = parts[0]
    copies = [clone_function(p.program) for p in parts]
    args = copies[0].args
    program = Function(name, args)
    results: list[Value] = []
    for copy in copies:
        replace_values(copy, dict(zip(copy.args, args, strict=True)) if copy is not copies[0] else {})
        program.ops += copy.ops
        results += copy.returns
    (type_,) = infer(OPS[op], results, dict(attrs), None)
    out = Value("joined", type_)
    program.ops.append(Op(op, list(results), dict(attrs), [out]))
    program.returns = [out]
    fresh_names(program)
    return Weight(name, type_, first.indices, program)


def derive_weight(name: str, source: Weight, steps: Sequence[tuple[str, dict[str, object]]]) -> Weight:
    """A weight whose program is that of `source` followed by `steps` of (op, attributes)."""
    weight = Weight(name, source.type, source.indices, clone_function(source.program, name))
    for op, attrs in steps:
        append_to_program(weight, op, **attrs)
    return weight
