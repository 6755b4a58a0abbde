"""An ONNX graph as a torch module that maps token ids to logits, node by node."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import nn

from moec.errors import near, printable
from moec.frontend.onnx_import import moe
from moec.frontend.onnx_import.files import OnnxError, to_torch
from moec.frontend.onnx_import.fused import FUSED
from moec.frontend.onnx_import.moving import MOVING
from moec.frontend.onnx_import.pieces import Pieces, Unsupported
from moec.frontend.onnx_import.standard import STANDARD, Op
from moec.frontend.onnx_import.tables import frequencies_of
from moec.frontend.onnx_import.values import Call, Step, known, run_known, settle, tensor

MICROSOFT = "com.microsoft"
OPS: dict[tuple[str, str], Op] = {("", name): f for name, f in (STANDARD | MOVING).items()} | FUSED
EXPERTS = ("MoE", "QMoE")
AS_PIECES = ("Transpose", "Shape", "ScatterND")
"""Operators that take a tensor in parts as it is."""


class OnnxModule(nn.Module):
    """The graph of one file: ids i64[1, T] -> the graph's first result of three dims."""

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        """Reads the weights and computes what depends on constants only. Raises OnnxError."""
        super().__init__()
        self.path = path
        self.steps = _steps(model, path)
        self.inputs = _inputs(model, path)
        self.outputs = [o.name for o in model.graph.output]
        self.constants: dict[str, Any] = {}
        for tensor_ in model.graph.initializer:
            self.constants[tensor_.name] = settle(to_torch(tensor_, path))
        self._fold()
        self.names: dict[str, str] = {}
        for step in self.steps:
            self._bind(step)
        for name in [n for n in self.constants if not isinstance(self.constants[n], np.ndarray)]:
            del self.constants[name]
        self.runners = nn.ModuleDict()
        for i, step in enumerate(self.steps):
            label = re.sub(r"\.", "_", printable(f"{step.scope}/{step.name or step.op}")) or step.op
            self.runners[label if label not in self.runners else f"{label}_{i}"] = _Runner(step)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [1, T, V]."""
        values: dict[str, Any] = {"": None, **self.constants, **self._given(input_ids)}
        values |= {name: self.get_parameter(place) for name, place in self.names.items()}
        made: dict[str, tuple[Step, list[Any]]] = {}
        bound = frozenset(self.names)
        for step, runner in zip(self.steps, self.runners.values(), strict=True):
            inputs = [values.get(name) for name in step.inputs]
            results = runner(Call(step, made, bound), inputs, self.path)
            for name, result in zip(step.outputs, results, strict=False):
                values[name] = result
                made[name] = (step, inputs)
        for name in self.outputs:
            result = values.get(name)
            if isinstance(result, torch.Tensor) and result.ndim == 3 and result.is_floating_point():
                return result
        raise OnnxError(file=self.path, message="no logits [batch, tokens, vocabulary] among its outputs")

    def _given(self, ids: torch.Tensor) -> dict[str, Any]:
        """A prompt from empty caches: all positions, all seen."""
        length = ids.shape[1]
        ids.is_ids = True  # type: ignore[attr-defined]
        values: dict[str, Any] = {}
        for name, (kind, dims, dtype) in self.inputs.items():
            if kind == "ids":
                values[name] = ids
                if dtype != torch.int64:
                    values[name] = ids.to(dtype)
                    values[name].is_ids = True
            elif kind == "mask":
                values[name] = torch.ones(1, length, dtype=dtype)
            elif kind == "positions":
                values[name] = torch.arange(length)[None].to(dtype)
            else:
                values[name] = torch.zeros(dims, dtype=dtype)
        return values

    def _fold(self) -> None:
        """Compute the nodes all of whose inputs are constants."""
        left: list[Step] = []
        made: dict[str, tuple[Step, list[Any]]] = {}
        for step in self.steps:
            if not step.inputs and step.op != "Constant":
                left.append(step)
                continue
            if step.op in EXPERTS or any(name and name not in self.constants for name in step.inputs):
                left.append(step)
                continue
            if step.op == "Constant":
                results: Sequence[Any] = [_constant(step, self.path)]
            else:
                inputs = [self.constants.get(name) for name in step.inputs]
                results = run(Call(step, made), inputs, self.path)
            for name, result in zip(step.outputs, results, strict=False):
                self.constants[name] = settle(result.contiguous()) if isinstance(result, torch.Tensor) else result
        self.steps = left

    def _bind(self, step: Step) -> None:
        """Make parameters of the constants that a step takes; right sides of products lie as [out, in]."""
        if step.domain == MICROSOFT and step.op in EXPERTS:
            self._experts(step)
            return
        if step.domain == MICROSOFT and step.op == "MatMulNBits":
            self._narrow(step)
        self._rotary(step)
        for i, name in enumerate(step.inputs):
            value = self.constants.get(name)
            if not isinstance(value, torch.Tensor):
                continue
            across = step.op == "MatMul" or (step.op == "Gemm" and not step.attrs.get("transB", 0))
            if i == 1 and value.ndim == 2 and across:
                step.inputs[i] = f"{name} across"
                value = value.t()
            self._parameter(step, step.inputs[i], name, value)

    def _parameter(self, step: Step, key: str, name: str, value: torch.Tensor) -> None:
        """A parameter under the tensor's own name, or that of the module it came from."""
        if key in self.names:
            return
        place = name
        if re.fullmatch(r"(val|_val|onnx::\w+?|const|constant|node)?[_\d.]*.*", name) and _made_up(name) and step.scope:
            place = f"{step.scope}.weight"
        place = re.sub(r"[^\w.]", "_", place).strip(".") or "weight"
        while place in self.names.values():
            stem, _, number = place.rpartition("__")
            place = f"{stem}__{int(number) + 1}" if stem and number.isdigit() else f"{place}__1"
        self.names[key] = place
        _put(self, place, nn.Parameter(value.contiguous(), requires_grad=False))

    def _experts(self, step: Step) -> None:
        given = step.inputs[2:]
        missing = [n for n in given if n and n not in self.constants]
        if missing:
            raise _refused(step, self.path, "experts whose weights are not constants")
        try:
            weights = moe.prepare(Call(step), [tensor(self.constants[n]) if n else None for n in given])
        except Unsupported as why:
            raise _refused(step, self.path, str(why)) from None
        step.inputs = step.inputs[:2]
        for value, title in zip(weights, ("gate_up", "gate_up_bias", "down", "down_bias"), strict=True):
            if value is None:
                step.inputs.append("")
                continue
            key = f"{given[0]} as {title}"
            scope = step.scope or re.sub(r"[._/]?(fc1|gate_up|w1)\w*([._]weights?)?(_q\w*)?$", "", given[0])
            self._parameter(step, key, f"{scope}.experts.{title}", value)
            step.inputs.append(key)

    def _narrow(self, step: Step) -> None:
        """A product with packed integers becomes one with their values."""
        names = [*step.inputs, *[""] * 6]
        if any(n and n not in self.constants for n in names[1:4]) or names[4]:
            raise _refused(step, self.path, "packed weights that are not constants, or in another order")
        w, scale, zero = (tensor(self.constants[n]) if n else None for n in names[1:4])
        bits, columns, rows = (int(step.attrs.get(n, d)) for n, d in (("bits", 4), ("K", 0), ("N", 0)))
        if w is None or scale is None or bits not in moe.WIDTHS:
            raise _refused(step, self.path, f"packed weights of {bits} bits")
        scale = scale.reshape(rows, -1)
        if zero is not None:
            zero = zero.reshape(rows, -1)
        value = moe.unpack(w.reshape(rows, -1), scale, zero, bits)[:, :columns]
        key = f"{names[1]} unpacked"
        self.constants[key] = value.t()
        step.op, step.domain = "MatMul", ""
        step.inputs = [names[0], key]
        if names[5]:
            raise _refused(step, self.path, "packed weights with a bias in the same node")

    def _rotary(self, step: Step) -> None:
        """Tables of cosines and sines become frequencies and a factor."""
        ours = step.domain == MICROSOFT
        at = {"GroupQueryAttention": 7, "RotaryEmbedding": 2 if ours else 1}.get(step.op)
        if at is None or len(step.inputs) <= at + 1 or not step.inputs[at]:
            return
        cos, sin = (self.constants.get(n) for n in step.inputs[at : at + 2])
        if not isinstance(cos, torch.Tensor) or not isinstance(sin, torch.Tensor):
            raise _refused(step, self.path, "tables of angles that are not constants")
        key = f"{step.inputs[at]} frequencies"
        if key not in self.names:
            try:
                frequencies, scale = frequencies_of(cos, sin)
            except Unsupported as why:
                raise _refused(step, self.path, str(why)) from None
            self._parameter(step, key, f"rotary.inv_freq_{len(frequencies)}", frequencies)
            self.constants[f"{key} scale"] = np.array(scale)
        step.inputs[at : at + 2] = [key, f"{key} scale"]


class _Runner(nn.Module):
    """One node; its name in the module tells a reader of the exported graph where an op comes from."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, call: Call, inputs: list[Any], path: Path) -> Sequence[Any]:
        return run(call, inputs, path)


def run(call: Call, inputs: list[Any], path: Path) -> Sequence[Any]:
    """The results of one node. Raises OnnxError."""
    step = call.step
    if step.domain == MICROSOFT and step.op in EXPERTS:
        function: Op | None = moe.run
    else:
        function = OPS.get((step.domain, step.op))
    if function is None:
        names = [n for d, n in OPS if d == step.domain] + ([*EXPERTS, "MatMulNBits"] if step.domain else [])
        raise _refused(step, path, f"no meaning here{near(step.op, names)}")
    while inputs and inputs[-1] is None and step.op not in EXPERTS:
        inputs = inputs[:-1]
    try:
        numbers = run_known(call, inputs)
        if numbers is not None:
            return [numbers]
        if step.op not in AS_PIECES:
            inputs = [v.whole() if isinstance(v, Pieces) else v for v in inputs]
        result = function(call, *inputs)
    except Unsupported as why:
        raise _refused(step, path, str(why)) from None
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError, KeyError) as error:
        if type(error).__module__.startswith("torch.fx"):
            raise
        raise _refused(step, path, f"cannot be computed ({printable(str(error).partition(chr(10))[0])})") from None
    return result if isinstance(result, tuple | list) else [result]


def _refused(step: Step, path: Path, why: str) -> OnnxError:
    domain = step.domain or "ai.onnx"
    name = printable(step.name or step.outputs[0])
    message = f"node {name}: {domain}::{printable(step.op)} of operator set {step.opset}: {why}"
    return OnnxError(file=path, message=message)


def _steps(model: onnx.ModelProto, path: Path) -> list[Step]:
    opsets = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.opset_import}
    steps = []
    for node in model.graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        attrs: dict[str, Any] = {}
        for a in node.attribute:
            value = helper.get_attribute_value(a)
            if isinstance(value, onnx.TensorProto):
                value = to_torch(value, path)
            elif isinstance(value, onnx.GraphProto):
                step = Step(node.op_type, domain, node.name, [], list(node.output), {}, opsets.get(domain, 1))
                raise _refused(step, path, "a branch or a loop, which no graph of the importer holds")
            attrs[a.name] = value
        outputs = list(node.output) or [""]
        opset = opsets.get(domain, 1)
        steps.append(Step(node.op_type, domain, node.name, list(node.input), outputs, attrs, opset, _scope(node)))
    return steps


def _scope(node: onnx.NodeProto) -> str:
    """The path of the module that a node came from: of torch's exporter, or of a name `/model/layers.0/mlp/MatMul`."""
    facts = {p.key: p.value for p in node.metadata_props}
    scopes = re.findall(r"'([^']*)'", facts.get("pkg.torch.onnx.name_scopes", ""))
    if len(scopes) > 1:
        return str(scopes[-2])
    return ".".join(p for p in node.name.split("/")[:-1] if p)


def _made_up(name: str) -> bool:
    """Whether an exporter invented the name of a tensor."""
    return bool(re.fullmatch(r"(val|const\w*|node\w*|t|_?\w*tensor)?_?\d+|onnx::\w+|/.*|.*_output_\d+", name))


def _put(root: nn.Module, place: str, parameter: nn.Parameter) -> None:
    *path, last = place.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part or "_", nn.Module())
        inner = root._modules[part or "_"]
        assert inner is not None
        root = inner
    root.register_parameter(last, parameter)


def _constant(step: Step, path: Path) -> Any:
    for name, value in step.attrs.items():
        if name == "value" and isinstance(value, torch.Tensor):
            return settle(value)
        if name.startswith("value_"):
            return np.asarray(value, dtype=np.float32 if "float" in name else np.int64)
    raise _refused(step, path, "a constant without a value of numbers")


def _inputs(model: onnx.ModelProto, path: Path) -> dict[str, tuple[str, list[int], torch.dtype]]:
    """What each input is: ids, mask, positions, or an empty cache; with dims for the latter."""
    from moec.frontend.onnx_import.files import DTYPES

    named = {t.name for t in model.graph.initializer}
    found: dict[str, tuple[str, list[int], torch.dtype]] = {}
    for value in model.graph.input:
        if value.name in named:
            continue
        kind = _kind(value.name)
        dims = [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]
        dtype = DTYPES.get(value.type.tensor_type.elem_type, torch.float32)
        if not kind:
            message = f"input {printable(value.name)} is none of input_ids, attention_mask, position_ids and past keys"
            raise OnnxError(file=path, message=message)
        if kind == "ids" and (len(dims) != 2 or dims[0] not in (None, 1) or dims[1] is not None):
            shown = [d if d is not None else "?" for d in dims]
            message = f"input {printable(value.name)} has dims {shown}; export it with [1, tokens] and tokens dynamic"
            raise OnnxError(file=path, message=message)
        empty = [1 if i == 0 else 0 if d is None else d for i, d in enumerate(dims)]
        found[value.name] = (kind, empty, dtype)
    if not any(kind == "ids" for kind, _, _ in found.values()):
        raise OnnxError(file=path, message="has no input of token ids")
    return found


def _kind(name: str) -> str:
    patterns = {"ids": r"(input_)?ids|input|tokens", "mask": r"attention_mask|mask", "positions": r"position_ids"}
    patterns["cache"] = r"past.*|cache.*|.*past_key.*"
    return next((kind for kind, pattern in patterns.items() if re.fullmatch(pattern, name)), "")


__all__ = ["OnnxModule", "known"]
