"""Tracing a declared model with torch.fx: a call of `functional.apply` becomes one op, a `Layers` one `repeat`."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch.fx
from torch import nn

from moec.errors import InputError
from moec.frontend.source import ModelSource
from moec.ir import (
    Builder,
    CacheType,
    Function,
    IndexType,
    Location,
    Module,
    TensorType,
    Type,
    Value,
    Weight,
    WeightRef,
)
from moec.ir.builder import weight_ref
from moec.ir.dims import symbol
from moec.ir.module import Operand
from moec.model_defs import functional
from moec.model_defs.layers import Computed, Layers, Turn
from moec.model_defs.names import Stored
from moec.model_defs.rope import table_attrs

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = (str(Path(torch.fx.__file__).parent), functional.__file__, __file__)
PAGE = 64
"""Tokens of a cache page."""


class _Tracer(torch.fx.Tracer):
    """Keeps `Layers` whole and notes the model's line on every node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Layers)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if not file.startswith(SKIPPED) and "/torch/" not in file:
                node.meta["loc"] = Location(_short(file), frame.f_lineno)
                break
            frame = frame.f_back  # type: ignore[assignment]
        return node


def _short(file: str) -> str:
    path = Path(file).resolve()
    for base in (ROOT / "model_defs", ROOT):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return path.name


class NoDraftModule(InputError):
    """Multi-token prediction of a model that has no module for it."""

    template: ClassVar[str] = "{model}: {reason}; leave --mtp away"


def trace_model(source: ModelSource, mtp: bool = False) -> Module:
    """The model as IR with `@prefill` and `@decode`, activations in bf16 until a recipe says more; reads no weight.

    With `mtp` both also return their hidden states, and `@draft` is the multi-token-prediction module that continues
    from them; its layer is the cache's last. Raises NoDraftModule.
    """
    module = Module(re.sub(r"\W", "_", source.name))
    if not mtp:
        importer = _Importer(module, source.family.model(source.config), source)
        for phase in ("prefill", "decode"):
            importer.entry(phase, phase)
        return module
    main, draft = _drafting(source)
    importer = _Importer(module, main, source, extra_layers=1)
    for phase in ("prefill", "decode"):
        importer.entry(phase, phase)
    importer = _Importer(module, draft, source, extra_layers=1)
    # A phase of several sequences, as decode; a prompt's tokens go through it in chunks.
    importer.entry("draft", "decode", hidden=True)
    return module


def _drafting(source: ModelSource) -> tuple[nn.Module, nn.Module]:
    if source.family.drafting is None:
        reason = f"multi-token prediction of {source.family.name} models is not declared"
        raise NoDraftModule(model=source.name, reason=reason)
    if not source.config.num_nextn_predict_layers:
        reason = "the model has no multi-token-prediction module (num_nextn_predict_layers is 0)"
        raise NoDraftModule(model=source.name, reason=reason)
    return source.family.drafting(source.config)


class _Importer:
    def __init__(self, module: Module, root: nn.Module, source: ModelSource, extra_layers: int = 0) -> None:
        """`extra_layers`: layers of the cache beyond the model's."""
        self.module = module
        self.layers = source.config.num_hidden_layers + extra_layers
        self.root = root
        self.source = source
        self.stacks = {name: m for name, m in root.named_modules() if isinstance(m, Layers)}

    def entry(self, name: str, phase: str, hidden: bool = False) -> None:
        """Add an entry function and, before it, its layer functions; with `hidden` it takes hidden states, too."""
        c = self.source.config
        tokens, batch, pages = symbol("T"), symbol("B"), symbol("P")
        kind, width = c.cache
        args: list[tuple[str, Type]] = [
            ("ids", TensorType("i32", (tokens,))),
            ("seq", TensorType("i32", (tokens,))),
            ("pos", TensorType("i32", (tokens,))),
            ("pages", TensorType("i32", (batch, symbol("N")))),
            ("starts", TensorType("i32", (batch + 1,))),
            ("rows", TensorType("i32", (symbol("R"),))),
            *([("hidden", TensorType("bf16", (tokens, c.hidden_size)))] if hidden else []),
            ("kv", CacheType(kind, (self.layers, pages, PAGE, width), "bf16")),
        ]
        self.function(name, phase, self.root, args, "", None)

    def function(
        self,
        name: str,
        phase: str,
        body: nn.Module,
        args: Sequence[tuple[str, Type]],
        prefix: str,
        stack: Layers | None,
    ) -> Function:
        """Trace one module into a function named `name`."""
        tracer = _Tracer()
        graph = tracer.trace(body)
        builder = Builder(self.module, name, {"phase": phase})
        env: dict[torch.fx.Node, Any] = {}
        given = iter(args)
        index: Value | None = None
        for node in graph.nodes:
            if node.op == "placeholder":
                arg_name, arg_type = next(given)
                env[node] = builder.arg(arg_name, arg_type)
                index = env[node] if isinstance(arg_type, IndexType) else index
            elif node.op == "get_attr":
                env[node] = self.weight(prefix + str(node.target), stack, index)
            elif node.op == "call_function" and node.target is operator.getitem:
                env[node] = self.value(node.args[0], env)[node.args[1]]
            elif node.op == "call_function" and node.target is functional.apply:
                operands = [self.value(a, env) for a in node.args[1:]]
                env[node] = builder.emit(str(node.args[0]), *operands, loc=node.meta.get("loc"), **node.kwargs)
            elif node.op == "call_module":
                env[node] = self.repeat(builder, node, phase, env)
            elif node.op == "output":
                result = node.args[0]
                several = result if isinstance(result, tuple) else (result,)
                return builder.returns(*(self.value(r, env) for r in several))
            else:
                raise TypeError(f"{node.meta.get('loc')}: {node.op} {node.target} is not an op of a model definition")
        raise AssertionError("a traced graph ends with its output")

    def value(self, arg: Any, env: Mapping[torch.fx.Node, Any]) -> Any:
        return env[arg] if isinstance(arg, torch.fx.Node) else arg

    def repeat(self, builder: Builder, node: torch.fx.Node, phase: str, env: Mapping[torch.fx.Node, Any]) -> Value:
        """One `repeat` over a stack of layers, whose function is traced first."""
        path = str(node.target)
        stack = self.stacks[path]
        operands: list[Operand] = [self.value(a, env) for a in node.args]
        names = ["x", *(o.name if isinstance(o, Value) else o.name.split(".")[-1] for o in operands[1:])]
        types = [("l", IndexType()), *((n, _type(o)) for n, o in zip(names, operands, strict=True))]
        function = self.function(f"{path}.{phase}", phase, stack.body, types, f"{path}.", stack)
        out = builder.emit(
            "repeat", *operands, loc=node.meta.get("loc"), func=function.name, first=stack.first, last=stack.last
        )
        assert isinstance(out, Value)
        return out

    def weight(self, path: str, stack: Layers | None, layer: Value | None) -> WeightRef:
        """The weight symbol of a parameter, declared with its program on first use."""
        relative = path.split(".", 1)[1] if stack else path
        parameter = (stack.body if stack else self.root).get_parameter(relative)
        if isinstance(parameter, Computed):
            path, stack = parameter.symbol, None
        if path not in self.module.weights:
            self.module.weights[path] = self.declare(path, relative, parameter, stack)
        return weight_ref(self.module.weights[path], [layer] if stack and layer else [])

    def declare(self, path: str, relative: str, parameter: nn.Parameter, stack: Layers | None) -> Weight:
        """The weight and its program: made by an op, or of the tensors that the family's table names."""
        indices: list[tuple[str, int, int]] = [("l", stack.first, stack.last + 1)] if stack else []
        program = Builder(Module(""), path)
        shape = tuple(parameter.shape)
        if isinstance(parameter, Computed):
            out = program.emit(parameter.made_by, **parameter.attrs)
        elif relative == "rope_table":
            out = program.emit("weight.rope_table", **_rope_attrs(self.source.config))
        else:
            stored = self.stored(relative, stack)
            if stored.stacked or any("{e}" in t for t in stored.names):
                indices.append(("e", 0, shape[0]))
                shape = shape[1:]
            args = {name: program.arg(name, IndexType()) for name, _, _ in indices}
            experts = indices[-1][2] if stored.stacked else 0
            out = load_program(program, stored, shape, experts, args.get("e"))
        assert isinstance(out, Value)
        program.function.returns = [out]
        return Weight(path, out.type, tuple(indices), program.function)

    def stored(self, relative: str, stack: Layers | None) -> Stored:
        """The checkpoint's tensors of a parameter, with the number of its layer where several make up a turn."""
        table = self.source.family.tensors
        turn = stack.body if stack else None
        numbering = ""
        if isinstance(turn, Turn):
            _, part, relative = relative.split(".", 2)
            scale, offset = turn.numbering(int(part))
            numbering = f"{{l*{scale}+{offset}}}"
        if relative == "head" and self.source.config.tie_word_embeddings:
            relative = "embed"
        given = table[relative]
        stored = given if isinstance(given, Stored) else Stored(given)
        if stack is None:
            # Outside of the layers only a module behind the last one belongs to one.
            numbering = str(self.source.config.num_hidden_layers)
        names = tuple(n.replace("{l}", numbering) if numbering else n for n in stored.names)
        return replace(stored, names=names)


def load_program(program: Builder, stored: Stored, shape: tuple[int, ...], experts: int, expert: Value | None) -> Value:
    """Load the tensors of one point of a weight of `shape`, bring them into the definition's order, and join them.

    `experts`: entries of a tensor that holds all of them, of which the weight takes `expert`.
    """
    parts = []
    part = (shape[0] // len(stored.names), *shape[1:])
    place, places = stored.columns
    lying = part[::-1] if stored.transposed else (*part[:-1], part[-1] * places)
    for name in stored.names:
        lead = (experts,) if stored.stacked else (1,) if stored.row else ()
        x = _one(program.emit("weight.load", tensor=name, shape=(*lead, *lying), dtype="bf16"))
        if stored.stacked:
            assert expert is not None
            x = _one(program.emit("weight.select", x, expert))
        if stored.transposed:
            x = _one(program.emit("weight.transpose", x, perm=(1, 0)))
        if places > 1:
            start, width = place * part[-1], part[-1]
            x = _one(program.emit("weight.slice", x, axis=len(part) - 1, start=start, stop=start + width))
        if stored.row:
            x = _one(program.emit("weight.reshape", x, shape=part))
        if stored.interleaved:
            x = gate_first(program, x, part)
        parts.append(x)
    return parts[0] if len(parts) == 1 else _one(program.emit("weight.concat", *parts, axis=0))


def gate_first(program: Builder, x: Value, shape: tuple[int, ...]) -> Value:
    """Rows of gate and up that take turns, brought behind one another."""
    pairs = _one(program.emit("weight.reshape", x, shape=(shape[0] // 2, 2, *shape[1:])))
    order = (1, 0, *range(2, len(shape) + 1))
    return _one(program.emit("weight.reshape", _one(program.emit("weight.transpose", pairs, perm=order)), shape=shape))


def _one(result: Value | tuple[Value, ...]) -> Value:
    assert isinstance(result, Value)
    return result


def _type(operand: Operand) -> Type:
    assert operand.type is not None
    return operand.type


def _rope_attrs(c: Any) -> dict[str, Any]:
    return table_attrs(c.rope, c.max_position_embeddings, c.qk_rope_head_dim)
