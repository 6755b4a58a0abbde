"""ONNX models that moec exported, back as IR: calls of local functions become ops, runs of layer calls a `repeat`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx
from onnx import helper

from moec.errors import InputError
from moec.ir import Builder, CacheType, Module, Type, Value, parse_module
from moec.ir.builder import weight_ref
from moec.ir.module import Operand
from moec.ir.optable import OPS
from moec.ir.type_parser import TypeParser

OPS_DOMAIN, LAYERS_DOMAIN = "moec", "moec.layers"


class NotExported(InputError):
    """An ONNX file that holds no program of moec."""

    template: ClassVar[str] = "{file}: {message}"


def read_exported(paths: Sequence[Path]) -> Module:
    """The module of the phases in `paths`, files that `moec export` wrote; raises NotExported."""
    module: Module | None = None
    for path in paths:
        model = _load(path)
        facts = {p.key: p.value for p in model.metadata_props}
        if "moec.weights" not in facts:
            raise NotExported(
                file=path, message="was not exported by moec: it has no moec.weights among its properties"
            )
        if module is None:
            module = parse_module(facts["moec.weights"])
        _Reader(module, model, json.loads(facts["moec.functions"])).read()
    assert module is not None
    return module


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load_model(str(path), load_external_data=False)
    except Exception as error:  # the library raises its own and protobuf's errors
        raise NotExported(file=path, message=f"is not an ONNX model ({type(error).__name__})") from None


class _Reader:
    def __init__(self, module: Module, model: onnx.ModelProto, facts: dict[str, Any]) -> None:
        self.module = module
        self.model = model
        self.facts = facts
        self.names = {n.replace(".", "_"): n for n in OPS}
        self.layers = {f.name: f for f in model.functions if f.domain == LAYERS_DOMAIN}
        self.original = {f.name: f.doc_string for f in self.layers.values()}

    def read(self) -> None:
        """Add the functions of the model, layer functions first."""
        graph = self.model.graph
        for name, function in self.layers.items():
            self.function(self.original[name], list(function.input), list(function.node), function.output[0])
        self.function(graph.name, [i.name for i in graph.input], list(graph.node), graph.output[0].name)

    def function(self, name: str, inputs: list[str], nodes: list[onnx.NodeProto], result: str) -> None:
        fact = self.facts[name]
        builder = Builder(self.module, name, dict(fact["attrs"]))
        env: dict[str, Operand] = {}
        for arg, text in fact["args"]:
            env[arg] = builder.arg(arg, _type(text))
        index = next((env[a] for a, text in fact["args"] if text == "index"), None)
        at = 0
        while at < len(nodes):
            node = nodes[at]
            if node.domain == LAYERS_DOMAIN:
                at += self.repeat(builder, env, nodes[at:])
                continue
            if node.op_type == "Identity":
                env[node.output[0]] = env[node.input[0]]
            else:
                self.op(builder, env, node, index)
            at += 1
        value = env[result]
        assert isinstance(value, Value)
        builder.returns(value)

    def operand(self, env: dict[str, Operand], name: str, index: Operand | None) -> Operand:
        if name in env:
            return env[name]
        weight = self.module.weights[name]
        by_layer = bool(weight.indices) and weight.indices[0][0] == "l"
        return weight_ref(weight, [index] if by_layer and isinstance(index, Value) else [])

    def op(self, builder: Builder, env: dict[str, Operand], node: onnx.NodeProto, index: Operand | None) -> None:
        name = self.names[node.op_type.split("__")[0]]
        rule = OPS[name]
        attrs = {a.name: _attribute(helper.get_attribute_value(a), rule.attrs[a.name].kind) for a in node.attribute}
        operands = [self.operand(env, i, index) for i in node.input]
        made = builder.emit(name, *operands, **attrs)
        results = made if isinstance(made, tuple) else (made,)
        if rule.effect == "write":
            env[node.output[0]] = next(o for o in operands if isinstance(o.type, CacheType))
        else:
            env.update(zip(node.output, results, strict=True))

    def repeat(self, builder: Builder, env: dict[str, Operand], nodes: list[onnx.NodeProto]) -> int:
        """One `repeat` for the calls of one layer function in turn; returns how many there are."""
        first = nodes[0]
        run = [first]
        for node in nodes[1:]:
            if node.op_type != first.op_type or node.domain != LAYERS_DOMAIN:
                break
            run.append(node)
        name = self.original[first.op_type]
        callee = self.module.functions[name]
        numbers = [int(n.input[0].removeprefix("layer.")) for n in run]
        operands = [self.operand(env, i, None) for i in first.input[1 : len(callee.args)]]
        made = builder.emit("repeat", *operands, func=name, first=numbers[0], last=numbers[-1])
        results = list(made) if isinstance(made, tuple) else [made]
        caches = [o for o in operands if isinstance(o.type, CacheType)]
        env.update(zip(run[-1].output, [*results, *caches], strict=True))
        return len(run)


def _type(text: str) -> Type:
    return TypeParser(text, "moec.functions").type()


def _attribute(value: Any, kind: str) -> Any:
    text = value.decode() if isinstance(value, bytes) else value
    match kind:
        case "float":
            return float(text)
        case "bool":
            return text == "true"
        case "ints":
            return tuple(int(v) for v in text)
        case "floats":
            return tuple(float(v) for v in text)
        case "int":
            return int(text)
    return text
