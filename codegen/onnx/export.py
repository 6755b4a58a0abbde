"""An artifact as ONNX models, one a phase: the IR's functions and ops as local functions over standard ops.

`prefill.onnx` and `decode.onnx` have the inputs of the phase's function (docs/artifact.md), the cache among them, and
give the logits and the new cache. Their graphs call one function a layer (domain `moec.layers`), which calls ops of the
IR (domain `moec`), whose bodies are standard ops. Weights lie in FP32 in `weights.bin`, which both share.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import onnx
from onnx import TensorProto, helper

from moec.codegen.onnx.bodies import BODIES, missing
from moec.codegen.onnx.graph import OPSET, Graph
from moec.codegen.onnx.weights import plain
from moec.errors import InputError
from moec.ir import CacheType, Function, IndexType, Module, Op, TensorType, Value, WeightRef, print_module
from moec.ir.optable import OPS
from moec.runtime.weights import Weights

OPS_DOMAIN, LAYERS_DOMAIN = "moec", "moec.layers"
WEIGHTS = "weights.bin"
ALIGN = 4096
IR_VERSION = 10


class NoBody(InputError):
    """An op that ONNX's standard ops do not express here."""

    template: ClassVar[str] = "no ONNX body for {ops}"


def export(module: Module, stored: Weights, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the models of both phases into `folder` and check them; raises NoBody before anything is written."""
    if lacking := missing([op for _, op in module.ops()]):
        raise NoBody(ops=", ".join(lacking))
    spans = _write_weights(module, stored, folder / WEIGHTS, progress)
    for phase in ("prefill", "decode"):
        path = folder / f"{phase}.onnx"
        onnx.save_model(_Exporter(module, spans).model(phase), path)
        onnx.checker.check_model(str(path), full_check=True)


def _write_weights(
    module: Module, stored: Weights, path: Path, progress: Callable[[int, int], None] | None
) -> dict[str, int]:
    """Write every weight, one after the other; returns where each begins."""
    spans: dict[str, int] = {}
    with path.open("wb") as file:
        for number, weight in enumerate(module.weights.values()):
            file.seek(-file.tell() % ALIGN, 1)
            spans[weight.name] = file.tell()
            file.write(plain(weight, stored).data)
            if progress is not None:
                progress(number + 1, len(module.weights))
    return spans


class _Exporter:
    def __init__(self, module: Module, spans: dict[str, int]) -> None:
        self.module = module
        self.spans = spans
        self.functions: dict[str, onnx.FunctionProto] = {}
        self.variants: dict[str, list[str]] = {}
        self.initialisers: dict[str, onnx.TensorProto] = {}

    def model(self, phase: str) -> onnx.ModelProto:
        """The model of one phase."""
        function = self.module.functions[phase]
        (kv,) = [a for a in function.args if isinstance(a.type, CacheType)]
        calls = _Calls(self, function)
        calls.run()
        inputs = [_value_info(a) for a in function.args]
        nodes = [*calls.graph.nodes, helper.make_node("Identity", [calls.names[function.returns[0]]], ["logits"])]
        nodes.append(helper.make_node("Identity", [calls.names[kv]], [f"{kv.name}_out"]))
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, _dims(function.returns[0].type))
        out = helper.make_tensor_value_info(f"{kv.name}_out", TensorProto.FLOAT, _dims(kv.type))
        graph = helper.make_graph(nodes, phase, inputs, [logits, out], list(self.initialisers.values()))
        domains = [helper.make_opsetid("", OPSET)]
        domains += [helper.make_opsetid(d, 1) for d in (OPS_DOMAIN, LAYERS_DOMAIN)]
        model = helper.make_model(
            graph, opset_imports=domains, functions=list(self.functions.values()), producer_name="moec"
        )
        model.ir_version = IR_VERSION
        helper.set_model_props(model, self.facts(phase))
        return model

    def facts(self, phase: str) -> dict[str, str]:
        """What the nodes do not show: weights with their programs, and the types of arguments."""
        only = Module(self.module.name, dict(self.module.attrs), self.module.weights, {})
        used = [f for f in self.module.functions.values() if f.name == phase or f.name.endswith(f".{phase}")]
        signatures = {f.name: {"args": [[a.name, str(a.type)] for a in f.args], "attrs": f.attrs} for f in used}
        return {"moec.weights": print_module(only), "moec.functions": json.dumps(signatures)}

    def weight(self, name: str, layer: int | None) -> str:
        """The initialiser of a weight, or of one of its layers."""
        weight = self.module.weights[name]
        assert isinstance(weight.type, TensorType)
        by_layer = layer is not None and bool(weight.indices) and weight.indices[0][0] == "l"
        label = f"{name}.{layer}" if by_layer else name
        if label not in self.initialisers:
            lead = [stop - start for _, start, stop in weight.indices]
            shape = [*lead, *(int(d) for d in weight.type.shape)]  # type: ignore[arg-type]
            size = 4
            for d in shape:
                size *= d
            offset = self.spans[name]
            if by_layer:
                assert layer is not None
                size //= shape[0]
                offset += size * (layer - weight.indices[0][1])
                shape = shape[1:]
            tensor = TensorProto(name=label, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", WEIGHTS), ("offset", offset), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
            self.initialisers[label] = tensor
        return label

    def index(self, layer: int) -> str:
        """The number of a layer as an initialiser."""
        label = f"layer.{layer}"
        if label not in self.initialisers:
            self.initialisers[label] = helper.make_tensor(label, TensorProto.INT64, [], [layer])
        return label

    def op_function(self, op: Op, operands: list[str]) -> str:
        """The local function of an op with these attributes and shapes; equal ones are one."""
        key = _variant_key(op)
        base = op.name.replace(".", "_")
        known = self.variants.setdefault(base, [])
        if key in known:
            return _variant_name(base, known.index(key))
        known.append(key)
        name = _variant_name(base, len(known) - 1)
        graph = Graph("t")
        results = BODIES[op.name](graph, op, operands)
        outputs = [f"y{i}" for i in range(len(results))]
        for result, output in zip(results, outputs, strict=True):
            graph.as_name(result, output)
        self.functions[name] = helper.make_function(
            OPS_DOMAIN,
            name,
            operands,
            outputs,
            graph.nodes,
            [helper.make_opsetid("", OPSET)],
            attributes=list(op.attrs),
        )
        self.functions[name].doc_string = (OPS[op.name].__doc__ or "").strip()
        return name

    def layer_function(self, function: Function) -> tuple[str, list[str]]:
        """The local function of a layer function, and the weights that it takes behind its arguments."""
        name = function.name.replace(".", "_")
        weights = list(dict.fromkeys(o.name for op in function.ops for o in op.operands if isinstance(o, WeightRef)))
        if name not in self.functions:
            calls = _Calls(self, function)
            calls.run()
            caches = [a for a in function.args if isinstance(a.type, CacheType)]
            outputs = [calls.names[v] for v in (*function.returns, *caches)]
            domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(OPS_DOMAIN, 1)]
            inputs = [*(a.name for a in function.args), *weights]
            self.functions[name] = helper.make_function(
                LAYERS_DOMAIN, name, inputs, outputs, calls.graph.nodes, domains
            )
            self.functions[name].doc_string = function.name
        return name, weights


class _Calls:
    """The ops of one function as calls; `names` are the present names of its values, caches included."""

    def __init__(self, exporter: _Exporter, function: Function) -> None:
        self.x = exporter
        self.function = function
        self.graph = Graph("c")
        self.names: dict[Value, str] = {a: a.name for a in function.args}
        self.inside = bool(function.args) and isinstance(function.args[0].type, IndexType)

    def run(self) -> None:
        """Append all ops in order."""
        for op in self.function.ops:
            if op.name == "repeat":
                self.repeat(op)
            else:
                self.call(op)

    def operand(self, operand: Value | WeightRef) -> str:
        if isinstance(operand, Value):
            return self.names[operand]
        return operand.name if self.inside else self.x.weight(operand.name, None)

    def call(self, op: Op) -> None:
        rule = OPS[op.name]
        formal = [n.rstrip("?*") for n in rule.operands.split()][: len(op.operands)]
        target = self.x.op_function(op, formal)
        results = [f"v{r.name}" for r in op.results]
        cache = next((o for o in op.operands if isinstance(o, Value) and isinstance(o.type, CacheType)), None)
        if rule.effect == "write" and cache is not None:
            results = [self.graph.name()]
            self_names = {cache: results[0]}
        else:
            self_names = dict(zip(op.results, results, strict=True))
        attrs = {key: _attribute(value) for key, value in op.attrs.items()}
        inputs = [self.operand(o) for o in op.operands]
        self.graph.nodes.append(helper.make_node(target, inputs, results, domain=OPS_DOMAIN, **attrs))
        self.names.update(self_names)

    def repeat(self, op: Op) -> None:
        callee = self.x.module.functions[str(op.attrs["func"])]
        name, weights = self.x.layer_function(callee)
        state = [self.operand(o) for o in op.operands]
        caches = [i for i, o in enumerate(op.operands) if isinstance(o.type, CacheType)]
        for layer in range(int(op.attrs["first"]), int(op.attrs["last"]) + 1):  # type: ignore[arg-type]
            given = [self.x.index(layer), *state, *(self.x.weight(w, layer) for w in weights)]
            outputs = [self.graph.name() for _ in (*callee.returns, *caches)]
            label = f"{name}.{layer}"
            self.graph.nodes.append(helper.make_node(name, given, outputs, domain=LAYERS_DOMAIN, name=label))
            count = len(callee.returns)
            state[:count] = outputs[:count]
            for i, output in zip(caches, outputs[count:], strict=True):
                state[i] = output
        for i in caches:
            operand = op.operands[i]
            assert isinstance(operand, Value)
            self.names[operand] = state[i]
        self.names.update(zip(op.results, state, strict=False))


def _variant_key(op: Op) -> str:
    shapes = [str(o.type) for o in op.operands if isinstance(o.type, TensorType | CacheType)]
    return json.dumps([len(op.operands), str(sorted(op.attrs.items())), shapes])


def _variant_name(base: str, number: int) -> str:
    return base if number == 0 else f"{base}__{number}"


def _attribute(value: Any) -> Any:
    """Integers and lists of them as they are; floats as text, which keeps all their digits; flags as text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    return list(value) if isinstance(value, tuple) else value


def _dims(t: Any) -> list[Any]:
    return [d if isinstance(d, int) else str(d).replace(" ", "") for d in t.shape]


def _value_info(arg: Value) -> onnx.ValueInfoProto:
    kind = TensorProto.FLOAT if isinstance(arg.type, CacheType) else TensorProto.INT32
    return helper.make_tensor_value_info(arg.name, kind, _dims(arg.type))
