"""Weights of an imported module: parameters by name as weight symbols, layers and experts as their indices."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import torch
from torch.fx import Node

from moec.frontend.torch_import.exported import Exported, ancestors, shape
from moec.frontend.torch_import.patterns import same
from moec.frontend.trace import gate_first
from moec.ir import Builder, IndexType, Module, Value, Weight, WeightRef
from moec.ir.builder import weight_ref

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}


class Weights:
    """Declares the weights of one function into `module`; `layer` is the number and the index of its layer."""

    def __init__(
        self, exported: Exported, module: Module, positions: int, stack: str, number: int | None, layer: Value | None
    ) -> None:
        self.exported = exported
        self.module = module
        self.positions = positions
        self.stack = stack
        self.number = number
        self.layer = layer

    def ref(self, node: Any) -> WeightRef:
        """A parameter."""
        return self._declare([node], None)

    def vector(self, node: Any) -> WeightRef:
        """A parameter of one row, as a vector."""
        return self._declare([node], None, flat=len(shape(node)) > 1)

    def table(self, node: Any) -> WeightRef:
        """The embedding, apart from an output head tied to it: each is stored as its readers want it."""
        return self._declare([node], None, "embed")

    def joined(self, nodes: list[Any]) -> WeightRef:
        """Parameters joined by rows."""
        return self._declare(nodes, None)

    def stacked(self, node: Node, transposed: bool = False, interleaved: bool = False) -> WeightRef:
        """Experts that lie in one tensor: `transposed` as `[in, out]`, `interleaved` with gate and up in turns."""
        return self._declare([node], int(shape(node)[0]), order=(transposed, interleaved))

    def ones(self, width: int) -> WeightRef:
        """The weight of a norm without one."""
        name = f"ones_{width}"
        if name not in self.module.weights:
            self._computed(name, "weight.fill", shape=(width,), value=1.0)
        return weight_ref(self.module.weights[name])

    def rope(self, exported: Exported, cos: Node, dims: int) -> tuple[WeightRef, int]:
        """The rotary table behind `cos`: its frequencies are those of the buffer that it depends on."""
        buffers = [n for n in ancestors(cos) if n.name in exported.parameters and len(shape(n)) == 1]
        frequencies = [exported.tensor(n) for n in buffers if exported.tensor(n).is_floating_point()]
        fitting = [f for f in frequencies if f.numel() * 2 == dims]
        inverse = next(iter(fitting or frequencies), None)
        inverse = computed_frequencies(exported, cos, dims) if inverse is None else inverse
        # At position 0 all angles are 0: what is left is a factor on all of them.
        scale = float(exported.value(cos, 2).reshape(2, -1)[0, 0].real)
        factors = tuple(float(1.0 / f) for f in inverse.double())
        attrs: dict[str, Any] = {"positions": self.positions, "dims": 2 * len(factors), "theta": 1.0, "factor": 1.0}
        attrs |= {"original": 1, "beta_fast": 32.0, "beta_slow": 1.0, "attention": scale, "truncate": True}
        attrs |= {"method": "factors", "factors": factors, "short_factors": factors, "short_attention": scale}
        for name, weight in self.module.weights.items():
            if name.startswith("rope_table") and weight.program.ops[0].attrs == attrs:
                return weight_ref(weight), 2 * len(factors)
        tables = sum(n.startswith("rope_table") for n in self.module.weights)
        name = f"rope_table_{tables}" if tables else "rope_table"
        self._computed(name, "weight.rope_table", **attrs)
        return weight_ref(self.module.weights[name]), 2 * len(factors)

    def temperature(self, dims: int, floor: float, scale: float) -> WeightRef:
        """The table of factors on queries."""
        name = "temperature"
        attrs = {"positions": self.positions, "dims": dims, "floor": floor, "scale": scale}
        while name in self.module.weights and self.module.weights[name].program.ops[0].attrs != attrs:
            name += "_"
        if name not in self.module.weights:
            self._computed(name, "weight.temperature_table", **attrs)
        return weight_ref(self.module.weights[name])

    def _computed(self, name: str, op: str, **attrs: Any) -> None:
        program = Builder(Module(""), name)
        out = program.emit(op, **attrs)
        assert isinstance(out, Value)
        program.function.returns = [out]
        self.module.weights[name] = Weight(name, out.type, (), program.function)

    def _declare(
        self,
        nodes: list[Any],
        experts: int | None,
        called: str = "",
        order: tuple[bool, bool] = (False, False),
        flat: bool = False,
    ) -> WeightRef:
        nodes = [same(n) for n in nodes]
        names = [self.exported.name(n) for n in nodes]
        templates = [self._template(n) for n in names]
        by_layer = templates != names
        last = [re.split(r"\.\{l\}\.|^", t)[-1].removesuffix(".weight") for t in templates]
        symbol = called or "_and_".join([last[0], *(n.rsplit(".", 1)[-1] for n in last[1:])])
        symbol = f"{self.stack}.{symbol}" if by_layer else symbol
        if symbol not in self.module.weights:
            self.module.weights[symbol] = self._weight(symbol, nodes, templates, by_layer, experts, order, flat)
        weight = self.module.weights[symbol]
        return weight_ref(weight, [self.layer] if by_layer and self.layer is not None else [])

    def _template(self, name: str) -> str:
        if self.number is None:
            return name
        return re.sub(rf"\.{self.number}\.", ".{l}.", name, count=1)

    def _weight(
        self,
        symbol: str,
        nodes: list[Any],
        templates: list[str],
        by_layer: bool,
        experts: int | None,
        order: tuple[bool, bool],
        flat: bool,
    ) -> Weight:
        program = Builder(Module(""), symbol)
        indices: list[tuple[str, int, int]] = []
        if by_layer:
            assert self.number is not None
            indices.append(("l", self.number, self.number + 1))
        if experts is not None:
            indices.append(("e", 0, experts))
        args = {name: program.arg(name, IndexType()) for name, _, _ in indices}
        loads = []
        for node, template in zip(nodes, templates, strict=True):
            tensor = self.exported.tensor(node)
            dims = tuple(int(d) for d in tensor.shape)
            x = program.emit("weight.load", tensor=template, shape=dims, dtype=DTYPES[tensor.dtype])
            if experts is not None:
                assert isinstance(x, Value)
                x = program.emit("weight.select", x, args["e"])
                dims = dims[1:]
            if flat:
                assert isinstance(x, Value)
                dims = (prod(dims),)
                x = program.emit("weight.reshape", x, shape=dims)
            transposed, interleaved = order
            if transposed:
                assert isinstance(x, Value)
                x, dims = program.emit("weight.transpose", x, perm=(1, 0)), dims[::-1]
            if interleaved:
                assert isinstance(x, Value)
                x = gate_first(program, x, dims)
            loads.append(x)
        out = loads[0] if len(loads) == 1 else program.emit("weight.concat", *loads, axis=0)  # type: ignore[arg-type]
        assert isinstance(out, Value)
        program.function.returns = [out]
        return Weight(symbol, out.type, tuple(indices), program.function)


def computed_frequencies(exported: Exported, cos: Node, dims: int) -> torch.Tensor:
    """Frequencies that a module makes of constants whenever it runs. Raises LookupError."""
    made = [n for n in exported.nodes if n.op == "call_function" and "val" in n.meta and shape(n) == (dims // 2,)]
    behind = ancestors(cos)
    constant = [n for n in made if n in behind and all(a.op != "placeholder" for a in ancestors(n))]
    if not constant:
        raise LookupError(dims)
    return exported.value(constant[-1], 2)
