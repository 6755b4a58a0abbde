"""`moec.trace(module, example)`: a torch module as IR with `@prefill` and `@decode`, equal layers rolled into one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from moec.frontend.source import ModelSource
from moec.frontend.torch_import import patterns as P
from moec.frontend.torch_import.exported import Exported, ancestors, layer_of, shape
from moec.frontend.torch_import.latent import latent
from moec.frontend.torch_import.layers import Span, spans_by_dominance
from moec.frontend.torch_import.raising import NotRaised, Raiser, Report
from moec.frontend.torch_import.weights import Weights
from moec.ir import Builder, CacheType, Function, IndexType, Module, TensorType, Type, Value, Weight, print_module
from moec.ir.dims import symbol
from moec.ir.rewrite import clone_function
from moec.model_defs.family import Family

PAGE = 64
POSITIONS = 4096
"""Positions of a module that does not say how many it has."""


@dataclass(frozen=True)
class TorchConfig:
    """What later stages ask of a model's configuration."""

    max_position_embeddings: int
    vocab_size: int
    num_hidden_layers: int
    cache: tuple[str, int]
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TorchSource(ModelSource):
    """An imported module: its tensors by name, and the report of what was raised."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    report: Report = field(default_factory=Report)


def trace_module(module: nn.Module, example: Sequence[torch.Tensor]) -> tuple[TorchSource, Module]:
    """Export, raise and roll up a module that maps ids i64[1, T] to logits [1, T, V].

    Raises DataDependent, NotExportable or NotRaised.
    """
    exported = Exported(module, example)
    config = getattr(module, "config", None)
    positions = int(getattr(config, "max_position_embeddings", None) or POSITIONS)
    name = re.sub(r"\W", "_", type(module).__name__)
    importer = _Importer(exported, Module(name), positions)
    importer.run()
    eos = getattr(config, "eos_token_id", None)
    ends = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (int(eos),)
    facts = TorchConfig(positions, importer.vocabulary, importer.layers, (importer.kind, importer.width), ends)
    family = Family("torch", (), lambda raw, name: facts, {}, lambda c: module)
    tensors = {n: t.detach() for n, t in exported.constants.items() if isinstance(t, torch.Tensor)}
    source = TorchSource(name, family, facts, {"model_type": "torch"}, None, tensors, importer.report)
    return source, importer.module


class _Importer:
    def __init__(self, exported: Exported, module: Module, positions: int) -> None:
        self.exported = exported
        self.module = module
        self.positions = positions
        self.report = Report()
        self.runs: list[tuple[Function, int, int]] = []
        self.kind, self.width = "kv.heads", 0
        self.vocabulary = self.layers = 0

    def run(self) -> None:
        """Raise layer by layer, then what is around them, and add the entry functions of both phases."""
        logits = self._logits()
        spans = self._spans_by_name() or spans_by_dominance(self.exported.nodes, logits)
        if not spans:
            raise NotRaised(module="the module", op="output", shape=[], why="it has no list of layers")
        self.layers = len(spans)
        for span in spans:
            self.exported.rename_inside(span.number, ancestors(span.out) - ancestors(span.first))
            self._layer(span)
        entry, out = spans[0].first, spans[-1].out
        for phase in ("prefill", "decode"):
            self._entry(phase, entry, out, logits)

    def _spans_by_name(self) -> list[Span]:
        """Layers by the numbers in the paths of their modules."""
        by_layer: dict[int, list[Node]] = {}
        for node in self.exported.nodes:
            number = layer_of(node)
            if number is not None and node.op == "call_function":
                by_layer.setdefault(number, []).append(node)
        spans: list[Span] = []
        for number in sorted(by_layer):
            inside = set(by_layer[number])
            first = self._input(inside, spans[-1].out if spans else None)
            spans.append(Span(number, first, self._output(inside)))
        return spans

    def _logits(self) -> Node:
        outputs = next(n for n in self.exported.nodes if n.op == "output").args[0]
        for node in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(node, Node) and len(shape(node)) == 3:
                self.vocabulary = int(shape(node)[-1])
                return P.same(node)  # type: ignore[no-any-return]
        raise NotRaised(module="the module", op="output", shape=[], why="no logits [1, T, V] among its results")

    def _input(self, inside: set[Node], before: Node | None) -> Node:
        """The hidden state that a layer takes: what the layer before gave, or a value of the model's width."""
        outside = {P.same(n) for node in inside for n in node.all_input_nodes if P.same(n) not in inside}
        if before is not None:
            return before
        wide: list[Node] = [n for n in outside if any(P.op(a).startswith("embedding") for a in ancestors(n))]
        if len(wide) != 1:
            raise NotRaised(module="layer 0", op="input", shape=[], why=f"{len(wide)} hidden states go in")
        return wide[0]

    def _output(self, inside: set[Node]) -> Node:
        used = [n for n in self.exported.nodes if n in inside and any(u not in inside for u in n.users)]
        used = list(dict.fromkeys(P.same(n) for n in used if P.same(n) in inside and len(shape(n)) == 3))
        if not used:
            raise NotRaised(module="a layer", op="output", shape=[], why="nothing of it is used behind it")
        return used[-1]

    def _layer(self, span: Span) -> None:
        """Raise one layer; it joins the run before it when it is equal up to the number."""
        number, first, out = span.number, span.first, span.out
        scratch = Module("")
        builder = Builder(scratch, "layer", {"phase": "prefill"})
        layer = builder.arg("l", IndexType())
        hidden = int(shape(first)[-1])
        x = builder.arg("x", TensorType("bf16", (symbol("T"), hidden)))
        report = Report()
        if not self.width:
            self.kind, self.width = _cache(self.exported, span)
        weights = Weights(self.exported, scratch, self.positions, "layers", number, layer)
        state = _state(builder, CacheType(self.kind, (self.layers, symbol("P"), PAGE, self.width), "bf16"))
        state["l"] = layer
        value = Raiser(self.exported, builder, weights, report, {first: x}, state).value(out)
        builder.returns(value)
        self._join(number, builder.function, scratch, report)

    def _join(self, number: int, function: Function, scratch: Module, report: Report) -> None:
        self.report.raised.update(report.raised)
        self.report.plain += report.plain
        text = _signature(function, scratch)
        if self.runs and self.runs[-1][0].attrs.get("text") == text:
            known, first, last = self.runs[-1]
            self.runs[-1] = (known, first, number)
            stack = str(known.attrs["stack"])
            for weight in self.module.weights.values():
                if weight.name.startswith(f"{stack}.") and weight.indices and weight.indices[0][0] == "l":
                    weight.indices = (("l", first, number + 1), *weight.indices[1:])
            assert last == number - 1
            return
        stack = "layers" if not self.runs else f"layers_{number}"
        self._adopt(function, scratch, stack)
        function.attrs |= {"text": text, "stack": stack}
        self.runs.append((function, number, number))

    def _adopt(self, function: Function, scratch: Module, stack: str) -> None:
        """Take over the weights of a layer under the name of its run."""
        renamed: dict[str, str] = {}
        for name, weight in scratch.weights.items():
            fresh = f"{stack}.{name.removeprefix('layers.')}" if name.startswith("layers.") else name
            renamed[name] = fresh
            if fresh not in self.module.weights:
                self.module.weights[fresh] = Weight(fresh, weight.type, weight.indices, weight.program)
                weight.program.name = fresh
        for op in function.ops:
            op.operands = [o if isinstance(o, Value) else replace(o, name=renamed[o.name]) for o in op.operands]

    def _entry(self, phase: str, first: Node, out: Node, logits: Node) -> None:
        for function, _, _ in self.runs:
            copy = clone_function(function, f"{function.attrs['stack']}.{phase}")
            copy.attrs = {"phase": phase}
            self.module.functions[copy.name] = copy
        builder = Builder(self.module, phase, {"phase": phase})
        tokens, batch = symbol("T"), symbol("B")
        ids = builder.arg("ids", TensorType("i32", (tokens,)))
        state: dict[str, Any] = {"ids": ids}
        for name, dims in (("seq", (tokens,)), ("pos", (tokens,)), ("pages", (batch, symbol("N")))):
            state[name] = builder.arg(name, TensorType("i32", dims))
        state["starts"] = builder.arg("starts", TensorType("i32", (batch + 1,)))
        rows = builder.arg("rows", TensorType("i32", (symbol("R"),)))
        kv = builder.arg("kv", CacheType(self.kind, (self.layers, symbol("P"), PAGE, self.width), "bf16"))
        weights = Weights(self.exported, self.module, self.positions, "layers", None, None)
        report = Report()
        x = Raiser(self.exported, builder, weights, report, {}, state).value(first)
        for function, start, stop in self.runs:
            name = f"{function.attrs['stack']}.{phase}"
            taken = [state[n] for n in ("seq", "pos", "pages", *(["starts"] if self.kind == "kv.latent" else []))]
            made = builder.emit("repeat", x, kv, *taken, func=name, first=start, last=stop)
            assert isinstance(made, Value)
            x = made
        gathered = builder.emit("rows.gather", x, rows)
        assert isinstance(gathered, Value)
        raiser = Raiser(self.exported, builder, weights, report, {P.same(out): gathered}, state, _head(logits))
        builder.returns(raiser.value(logits))
        if phase == "prefill":
            self.report.raised.update(report.raised)
            self.report.plain += report.plain


def _cache(exported: Exported, span: Span) -> tuple[str, int]:
    """Kind of the cache and elements of a cached position, from the attention that a layer holds."""
    inside = ancestors(span.out) - ancestors(span.first)
    for node in exported.nodes:
        found = P.attention(node) if node in inside and node.op == "call_function" else None
        if found is not None:
            compressed = latent(found)
            if compressed is not None:
                return "kv.latent", compressed.rank + compressed.key.dims
            k, v = shape(found.k), shape(found.v)
            return "kv.heads", int(k[1] if isinstance(k[1], int) else k[2]) * (int(k[-1]) + int(v[-1]))
    raise NotRaised(module=f"layer {span.number}", op="attention", shape=[], why="no attention of a known form in it")


def _state(builder: Builder, kv: CacheType) -> dict[str, Any]:
    args: list[tuple[str, Type]] = [
        ("kv", kv),
        ("seq", TensorType("i32", (symbol("T"),))),
        ("pos", TensorType("i32", (symbol("T"),))),
        ("pages", TensorType("i32", (symbol("B"), symbol("N")))),
    ]
    if kv.kind == "kv.latent":
        args.append(("starts", TensorType("i32", (symbol("B") + 1,))))
    return {name: builder.arg(name, type_) for name, type_ in args}


def _signature(function: Function, scratch: Module) -> str:
    """The text of a layer without its number."""
    weights = {}
    for name, w in scratch.weights.items():
        indices = tuple(i for i in w.indices if i[0] != "l")
        weights[name] = Weight(
            name, w.type, (("l", 0, 1), *indices) if len(indices) < len(w.indices) else indices, w.program
        )
    return print_module(Module("m", {}, weights, {"layer": function}), locations=False)


def _head(logits: Node) -> Node:
    node: Any = logits
    while P.op(node).startswith(("mul.Tensor", "div.Tensor")):
        node = P.same(node.args[0])
    return node  # type: ignore[no-any-return]
