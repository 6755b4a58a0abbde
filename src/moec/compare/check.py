"""Evaluating each op on what the kernels handed to it, and comparing its results with the trace.

Errors therefore do not add up from op to op: one that departs does so by its own kernel or its own weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.compare.result import OpError, relative_error
from moec.compare.routing import check_routing
from moec.compare.weights import StoredWeights
from moec.ir import OPS, CacheType, Function, Module, Op, TensorType, Value, print_op
from moec.ir.evaluate import Evaluator, Loader, WeightPrograms

Place = tuple[str, int | None, int]
"""Function, layer, and number of an op in the function."""

Trace = Mapping[tuple[str, int | None, int, int], torch.Tensor]
"""f32 words from the beginning of a result on: by place and number of the result."""


@dataclass(frozen=True)
class _Pair:
    """A value twice: as the reference made it from end to end, and as the kernels did."""

    own: Any
    kernel: Any


class OpCheck(Evaluator):
    """Evaluates every op on both halves of its operands and compares the second result with the trace."""

    def __init__(self, module: Module, loader: Loader, trace: Trace, stored: StoredWeights, bound: float) -> None:
        super().__init__(module, WeightPrograms(module, loader))
        self.bound = bound
        self.errors: list[OpError] = []
        self.near_ties = 0
        self._loader = loader
        self._kept = trace
        self._stored = stored
        self._sizes: dict[str, int] = {}

    def run(self, inputs: Mapping[str, torch.Tensor], page_size: int) -> torch.Tensor:
        """Check `@prefill` of one sequence; returns the logits of the reference alone, from end to end."""
        function = self.module.functions["prefill"]
        tokens = len(inputs["ids"])
        self._sizes = {"T": tokens, "S": tokens, "R": tokens, "P": -(-tokens // page_size)}
        # A model that is drafted for returns its hidden states behind the logits.
        logits, *_ = self.call(function, [self._argument(a, inputs) for a in function.args])
        return logits.own  # type: ignore[no-any-return]

    def call(self, function: Function, args: Sequence[Any]) -> list[Any]:
        """Results of one function as pairs; of the arguments, layer indices and weights are no pairs."""
        env: dict[Value, Any] = dict(zip(function.args, args, strict=True))
        layer = next((a for a in args if isinstance(a, int)), None)
        for number, op in enumerate(function.ops):
            operands = [self._operand(o, env) for o in op.operands]
            if op.name == "repeat":
                results = OPS["repeat"].evaluate(operands, op.attrs, self)
            else:
                results = self._step(op, operands, (function.name, layer, number))
            env.update(zip(op.results, results, strict=True))
        # Every layer has weights of its own: those of the layers before would only fill the memory.
        self.weights = WeightPrograms(self.module, self._loader)
        return [env[v] for v in function.returns]

    def _argument(self, arg: Value, inputs: Mapping[str, torch.Tensor]) -> _Pair:
        if isinstance(arg.type, CacheType):
            return _Pair(self.new_cache(arg.type, self._sizes), self.new_cache(arg.type, self._sizes))
        return _Pair(inputs[arg.name], inputs[arg.name])

    def _step(self, op: Op, operands: list[Any], place: Place) -> list[_Pair]:
        evaluate = OPS[op.name].evaluate
        own = evaluate([o.own if isinstance(o, _Pair) else o for o in operands], op.attrs, self)
        handed = [o.kernel if isinstance(o, _Pair) else o for o in operands]
        expected = evaluate(handed, op.attrs, self)
        got = [self._traced(value, place, i) for i, value in enumerate(op.results)]
        if any(g is not None for g in got):
            self._compare(op, handed, got, expected, place)
        # Views are not in the trace: what they show is.
        results = [e if g is None else g for g, e in zip(got, expected, strict=True)]
        return [_Pair(o, k) for o, k in zip(own, results, strict=True)]

    def _compare(
        self, op: Op, handed: list[Any], got: list[torch.Tensor | None], expected: list[torch.Tensor], place: Place
    ) -> None:
        known = [(g, e) for g, e in zip(got, expected, strict=True) if g is not None]
        rerouted = 0
        if op.name == "moe.route":
            routing = check_routing(op, handed, [g for g, _ in known], expected, self)
            error, rerouted = routing.error, routing.rerouted
            self.near_ties += routing.near_ties
        else:
            error = max(relative_error(g, e) for g, e in known)
        function, layer, _ = place
        location = (f"{op.loc.file}:{op.loc.line}", *op.loc.passes) if op.loc else ()
        text = print_op(op, locations=False)
        weights = self._stored.differing(self.weights, op, layer) if error > self.bound else ()
        self.errors.append(OpError(function, layer, text, location, error, rerouted, weights))

    def _traced(self, value: Value, place: Place, number: int) -> torch.Tensor | None:
        words = self._kept.get((*place, number))
        if words is None:
            return None
        assert isinstance(value.type, TensorType)
        shape = value.type.bound(self._sizes)
        words = words[: torch.Size(shape).numel()]
        return (words.view(torch.int32) if value.type.dtype == "i32" else words).reshape(shape)
