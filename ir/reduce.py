"""Delta debugging of modules: the smallest module found that a test still calls interesting.

Chunks of functions, ops, results, arguments and weights are taken out, larger ones first (Zeller and Hildebrandt,
"Simplifying and isolating failure-inducing input", TSE 2002), until nothing more can go one by one. What used the
result of a removed op takes one of that op's operands, or a new argument: every candidate is a valid module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moec.ir.builder import weight_ref
from moec.ir.dims import DimError
from moec.ir.issue import CALLS
from moec.ir.lexer import ParseError
from moec.ir.module import Function, Module, Op, Value, WeightRef
from moec.ir.optable import OPS, PLACEMENT, TypeRuleError
from moec.ir.parser import parse_module
from moec.ir.printer import print_module
from moec.ir.rewrite import clone_module, fresh_names, remove_dead, replace_values
from moec.ir.types import TensorType, Type
from moec.ir.verify import VerifyError, verify

SMALL = (1, 2, 8, 16, 128)
"""Sizes that a dim is shrunk to, smallest first; 128 is the width of a scale block."""
DIM = re.compile(r"(?<![\w.%@\-])\d+(?![\w.])")


class _Unfit(Exception):
    """A removal that leaves no valid module."""


def reduce(module: Module, fails: Callable[[str], bool]) -> Module:
    """The smallest module found whose text `fails`; `module` itself is assumed to. Its text parses.

    `fails` is asked once per text. The result is minimal: no single function, op, result, argument, weight or optional
    attribute of it can be left out.
    """
    return _Reducer(clone_module(module), fails).run()


@dataclass
class _Reducer:
    module: Module
    fails: Callable[[str], bool]
    known: dict[str, bool] = field(default_factory=dict)

    def run(self) -> Module:
        while True:
            before = print_module(self.module)
            for items, remove in REMOVALS:
                self._remove(items, remove)
            self._shrink_dims()
            if print_module(self.module) == before:
                return self.module

    def _remove(
        self, items: Callable[[Module], Sequence[Any]], remove: Callable[[Module, Sequence[Any]], None]
    ) -> None:
        size = len(items(self.module))
        while size:
            at = 0
            while chunk := items(self.module)[at : at + size]:
                if not self._attempt(lambda m, chunk=chunk: remove(m, chunk)):  # type: ignore[misc]
                    at += size
            size = min(size // 2, len(items(self.module)))

    def _attempt(self, edit: Callable[[Module], None]) -> bool:
        candidate = clone_module(self.module)
        try:
            edit(candidate)
            for function in [*candidate.functions.values(), *(w.program for w in candidate.weights.values())]:
                fresh_names(function)
            verify(candidate)
        except (_Unfit, VerifyError, TypeRuleError, DimError):
            return False
        return self._accept(print_module(candidate))

    def _accept(self, text: str) -> bool:
        try:
            parsed = parse_module(text)
        except ParseError:
            return False
        if text not in self.known:
            self.known[text] = text != print_module(self.module) and self.fails(text)
        if self.known[text]:
            self.module = parsed
        return self.known[text]

    def _shrink_dims(self) -> None:
        """Replace a number wherever the text has it, so that types still agree."""
        for number in sorted({int(n) for n in DIM.findall(print_module(self.module)) if len(n) < 10}, reverse=True):
            for small in (s for s in SMALL if s < number):
                text = print_module(self.module)
                head, _, body = text.partition("\n")
                if self._accept(head + "\n" + re.sub(rf"(?<![\w.%@\-]){number}(?![\w.])", str(small), body)):
                    break


# Functions: those that others call become entries when their caller goes.


def _functions(module: Module) -> list[str]:
    return list(module.functions)


def _remove_functions(module: Module, names: Sequence[str]) -> None:
    for name in names:
        _remove_ops(module, _calls(module, name))
        del module.functions[name]


def _calls(module: Module, callee: str) -> list[tuple[str, int]]:
    return [
        (f.name, i)
        for f in module.functions.values()
        for i, op in enumerate(f.ops)
        if op.name in CALLS and op.attrs["func"] == callee
    ]


# Ops.


def _ops(module: Module) -> list[tuple[str, int]]:
    return [(f.name, i) for f in module.functions.values() for i in range(len(f.ops))]


def _remove_ops(module: Module, places: Sequence[tuple[str, int]]) -> None:
    for name in dict.fromkeys(p[0] for p in places):
        function = module.functions[name]
        gone = [function.ops[i] for n, i in places if n == name]
        new: dict[Value, Value] = {}
        for op in gone:
            for result in op.results:
                same = [v for v in op.values() if v.type == result.type]
                new[result] = same[0] if same else Value(result.name, result.type)
        function.ops = [op for op in function.ops if op not in gone]
        replace_values(function, new)
        used = {v for op in function.ops for v in op.values()} | set(function.returns)
        for value in new.values():
            if value in used and value not in function.args and not any(value in op.results for op in function.ops):
                _add_argument(module, function, value)


def _add_argument(module: Module, function: Function, value: Value) -> None:
    taken = {a.name for a in function.args}
    value.name = next(n for i in range(len(taken) + 1) if (n := f"x{i}") not in taken)
    function.args.append(value)
    for name, i in _calls(module, function.name):
        caller = module.functions[name]
        passed = Value(value.name, value.type)
        caller.ops[i].operands.append(passed)
        _add_argument(module, caller, passed)


# Results, arguments and weights.


def _returns(module: Module) -> list[tuple[str, int]]:
    return [(f.name, i) for f in module.functions.values() for i in range(len(f.returns))]


def _remove_returns(module: Module, places: Sequence[tuple[str, int]]) -> None:
    for name in dict.fromkeys(p[0] for p in places):
        function = module.functions[name]
        gone = {i for n, i in places if n == name}
        kept = [v for i, v in enumerate(function.returns) if i not in gone]
        for caller_name, at in _calls(module, name):
            # The results of a layer are the leading arguments of the next: only the last may go.
            if min(gone) < len(kept):
                raise _Unfit
            caller = module.functions[caller_name]
            op = caller.ops[at]
            replace_values(caller, dict(zip(op.results[len(kept) :], _values(op)[len(kept) :], strict=False)))
            op.results = op.results[: len(kept)]
        function.returns = kept


def _values(op: Op) -> list[Value]:
    if not all(isinstance(o, Value) for o in op.operands):
        raise _Unfit
    return [o for o in op.operands if isinstance(o, Value)]


def _arguments(module: Module) -> list[tuple[str, int]]:
    return [(f.name, i) for f in module.functions.values() for i in range(len(f.args))]


def _remove_arguments(module: Module, places: Sequence[tuple[str, int]]) -> None:
    """Unused arguments go; a used one is replaced by another of its type."""
    for name in dict.fromkeys(p[0] for p in places):
        function = module.functions[name]
        gone = [function.args[i] for n, i in places if n == name]
        kept = [a for a in function.args if a not in gone]
        used = {v for op in function.ops for v in op.values()} | set(function.returns)
        new: dict[Value, Value] = {}
        for arg in gone:
            if arg in used:
                same = [a for a in kept if a.type == arg.type]
                if not same:
                    raise _Unfit
                new[arg] = same[0]
        replace_values(function, new)
        for caller, at in _calls(module, name):
            op = module.functions[caller].ops[at]
            op.operands = [o for o, a in zip(op.operands, function.args[1:], strict=True) if a in kept]
        function.args = kept


def _weights(module: Module) -> list[str]:
    return list(module.weights)


def _remove_weights(module: Module, names: Sequence[str]) -> None:
    """Unused weights go; a used one becomes an argument of the functions that use it."""
    for function in list(module.functions.values()):
        made: dict[tuple[str, Type | None], Value] = {}
        for op in function.ops:
            for i, operand in enumerate(op.operands):
                if isinstance(operand, WeightRef) and operand.name in names:
                    key = (operand.name, operand.type)
                    if key not in made:
                        assert operand.type is not None
                        made[key] = Value("w", operand.type)
                        _add_argument(module, function, made[key])
                    op.operands[i] = made[key]
    for name in names:
        del module.weights[name]


def _made(module: Module) -> list[tuple[str, int]]:
    """Ops of weight programs that a load of their result can stand for, from the last."""
    return [
        (w.name, i)
        for w in module.weights.values()
        for i in reversed(range(len(w.program.ops)))
        if w.program.ops[i].operands or w.program.ops[i].name == "weight.rope_table"
    ]


def _load_instead(module: Module, places: Sequence[tuple[str, int]]) -> None:
    """The checkpoint holds what the ops made."""
    for name, i in places:
        program = module.weights[name].program
        op = program.ops[i]
        t = op.result.type
        if not isinstance(t, TensorType) or t.layout or (t.quant and not all(t.quant.block)):
            raise _Unfit
        attrs: dict[str, Any] = {"tensor": f"{name}.{i}", "shape": t.shape, "dtype": t.dtype}
        if t.quant:
            attrs |= {"scales": f"{name}.{i}.scales", "granularity": "x".join(map(str, t.quant.block))}
        program.ops[i] = Op("weight.load_scaled" if t.quant else "weight.load", [], attrs, [op.result])
    for name in dict.fromkeys(p[0] for p in places):
        remove_dead(module.weights[name].program)


def _ends(module: Module) -> list[tuple[str, int]]:
    """Values that the last op of a weight program takes."""
    ends = [(w.name, w.program.producer().get(w.program.returns[0])) for w in module.weights.values()]
    return [(name, i) for name, op in ends if op is not None for i in range(len(op.operands))]


def _end_earlier(module: Module, places: Sequence[tuple[str, int]]) -> None:
    """A program without its last op; ops that use the weight must still accept its type."""
    for name, i in dict(places).items():
        weight = module.weights[name]
        weight.program.returns = [_values(weight.program.producer()[weight.program.returns[0]])[i]]
        weight.type = weight.program.returns[0].type
        remove_dead(weight.program)


def _ranges(module: Module) -> list[tuple[str, int]]:
    return [
        (w.name, i) for w in module.weights.values() for i, (_, start, stop) in enumerate(w.indices) if stop - start > 1
    ]


def _one_point(module: Module, places: Sequence[tuple[str, int]]) -> None:
    for name, at in places:
        weight = module.weights[name]
        weight.indices = tuple(
            (index, start, start + 1 if i == at else stop) for i, (index, start, stop) in enumerate(weight.indices)
        )
        for op in (op for _, op in module.ops()):
            for n, o in enumerate(op.operands):
                if isinstance(o, WeightRef) and o.name == name:
                    op.operands[n] = weight_ref(weight, o.indices)


# What ops carry besides operands.


def _attributes(module: Module) -> list[tuple[str, int, str]]:
    """Optional attributes of ops (position -2 for those of the module, -1 for a function's)."""
    found = [("", -2, key) for key in module.attrs]
    for f in module.functions.values():
        found += [(f.name, -1, key) for key in f.attrs]
        for i, op in enumerate(f.ops):
            own = OPS[op.name].attrs
            found += [(f.name, i, key) for key in op.attrs if (own[key].optional if key in own else key in PLACEMENT)]
    return found


def _remove_attributes(module: Module, places: Sequence[tuple[str, int, str]]) -> None:
    for name, i, key in places:
        holder = module if i == -2 else module.functions[name] if i == -1 else module.functions[name].ops[i]
        del holder.attrs[key]


def _located(module: Module) -> list[tuple[str, int]]:
    return [(f.name, i) for f in module.functions.values() for i, op in enumerate(f.ops) if op.loc is not None]


def _remove_locations(module: Module, places: Sequence[tuple[str, int]]) -> None:
    for name, i in places:
        module.functions[name].ops[i].loc = None


def _long_repeats(module: Module) -> list[tuple[str, int]]:
    return [
        (f.name, i)
        for f in module.functions.values()
        for i, op in enumerate(f.ops)
        if op.name == "repeat" and op.attrs["last"] != op.attrs["first"]
    ]


def _shorten_repeats(module: Module, places: Sequence[tuple[str, int]]) -> None:
    for name, i in places:
        op = module.functions[name].ops[i]
        op.attrs["last"] = op.attrs["first"]


REMOVALS: tuple[tuple[Callable[[Module], Sequence[Any]], Callable[[Module, Any], None]], ...] = (
    (_functions, _remove_functions),
    (_ops, _remove_ops),
    (_returns, _remove_returns),
    (_weights, _remove_weights),
    (_arguments, _remove_arguments),
    (_ends, _end_earlier),
    (_made, _load_instead),
    (_ranges, _one_point),
    (_attributes, _remove_attributes),
    (_located, _remove_locations),
    (_long_repeats, _shorten_repeats),
)
"""What can be taken out of a module: the items, and how some of them go."""
