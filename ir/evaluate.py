"""The reference evaluator: runs a module op by op in plain torch, weights through their weight programs.

Slow and simple on purpose: it is what kernels and passes are checked against. Needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch

from moec.errors import MoecError
from moec.ir.accumulate import ATTRIBUTE, EXACT, TARGET, UNPROMOTED, fraction_bits, hopper_product
from moec.ir.mesh import mesh_of
from moec.ir.module import Function, Module, Op, Value, WeightRef
from moec.ir.numeric import TORCH, Quantised, logical, quantise
from moec.ir.ops.weight_sources import tensor_name
from moec.ir.optable import OPS
from moec.ir.printer import print_op
from moec.ir.replicas import Replicas, replicas_of
from moec.ir.spmd import Group, Peers
from moec.ir.types import CacheType, TensorType

Loader = Callable[[str, tuple[int, ...], str], torch.Tensor]
"""Returns a checkpoint tensor by name; shape and element type are those that the program states."""


class EvaluationError(MoecError):
    """An op whose operands' values its rule cannot take, such as an index outside a table."""

    template: ClassVar[str] = "@{function}: cannot evaluate {op}: {reason}"


class WeightPrograms:
    """Runs weight programs: `value` is one point as stored, `tensor` the logical tensor with open indices stacked.

    Of a sharded module they are the weights of one `rank` of its mesh.
    """

    def __init__(self, module: Module, loader: Loader, rank: int = 0) -> None:
        self.module = module
        self.rank = rank
        self.torch = torch
        self._loader = loader
        self._point: dict[str, int] = {}
        self._cache: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def take_over(self, other: WeightPrograms, names: Collection[str]) -> None:
        """Keep the tensors that `other` made of the weights `names`, whose programs must be the same in both."""
        self._cache.update({key: tensor for key, tensor in other._cache.items() if key[0] in names})

    def load(self, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """A checkpoint tensor; `{l}` and `{e}` in its name stand for the current indices."""
        return self._loader(tensor_name(name, self._point), shape, dtype)

    def stand_for(self, index: str, value: int) -> None:
        """From here on `{index}` in names of the current program is `value`."""
        self._point[index] = value

    def coordinate(self, axis: str) -> int:
        """Where this rank stands on a mesh axis."""
        return mesh_of(self.module).index(self.rank, axis)

    def replicas(self, layer: int, experts: int, slots: int) -> Replicas:
        """The slots of a layer, counted from the first that has experts."""
        return replicas_of(self.module, layer, experts, slots)

    def value(self, name: str, point: Sequence[int]) -> Any:
        """The stored form (tensor, Quantised or Packed) of one index point."""
        weight = self.module.weights[name]
        self._point = {i[0]: p for i, p in zip(weight.indices, point, strict=True)}
        env: dict[Value, Any] = dict(zip(weight.program.args, point, strict=True))
        for op in weight.program.ops:
            inputs = [env[o] for o in op.operands if isinstance(o, Value)]
            env.update(zip(op.results, OPS[op.name].evaluate(inputs, op.attrs, self), strict=True))
        return env[weight.program.returns[0]]

    def tensor(self, name: str, fixed: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The logical tensor of `@name[fixed]`; indices left open are stacked in front."""
        if (name, fixed, dtype) not in self._cache:
            weight = self.module.weights[name]
            open_ranges = weight.indices[len(fixed) :]
            self._cache[name, fixed, dtype] = self._stack(name, fixed, open_ranges, dtype)
        return self._cache[name, fixed, dtype]

    def _stack(
        self, name: str, fixed: tuple[int, ...], ranges: Sequence[tuple[str, int, int]], dtype: torch.dtype
    ) -> torch.Tensor:
        if not ranges:
            return logical(self.value(name, fixed), dtype)
        _, start, stop = ranges[0]
        return torch.stack([self._stack(name, (*fixed, i), ranges[1:], dtype) for i in range(start, stop)])


class Evaluator:
    """Evaluates functions of a module.

    `compute` is the torch type of all arithmetic; with `rounding` every result is rounded to its stated element type,
    as a machine that stores it would. `trace` is called with each op and its results. A sharded module is evaluated by
    one evaluator a rank, all at once: `peers` joins them (see `spmd.run_ranks`). `accumulate`, one of
    `accumulate.ACCUMULATE`, says how products of quantised inputs are summed: `target` as the matrix units do that the
    module was compiled for (in the compute type without `rounding`), `hopper` as those of Hopper do.
    """

    def __init__(
        self,
        module: Module,
        weights: WeightPrograms,
        compute: torch.dtype = torch.float32,
        rounding: bool = True,
        trace: Callable[[Function, Op, list[Any]], None] | None = None,
        peers: Peers | None = None,
        accumulate: str = TARGET,
    ) -> None:
        self.module = module
        self._peers = peers
        self.torch = torch
        self.weights = weights
        self.compute = compute
        self.rounding = rounding
        self.promote = accumulate != UNPROMOTED
        if accumulate == TARGET and not rounding:
            accumulate = EXACT
        self.fraction_bits = fraction_bits(accumulate, module.attrs.get(ATTRIBUTE))
        self.cache_type = CacheType("kv.latent", (), "f32")
        self._trace = trace

    def new_cache(self, type: CacheType, symbols: dict[str, int]) -> torch.Tensor:
        """An empty cache of a cache type; stored in the compute type, rounded on writing."""
        self.cache_type = type
        shape = TensorType(type.dtype, type.shape).bound(symbols)
        return torch.zeros(shape, dtype=self.compute)

    def cached(self, latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """A row of the latent cache as the cache holds it."""
        quant = self.cache_type.quant
        if quant is None or not self.rounding:
            return self.round(torch.cat((latent, rope), -1), self.cache_type.dtype)
        stored = quantise(latent, self.cache_type.dtype, (1, quant.block[-1]), quant.scale)
        return torch.cat((stored.dequantise(self.compute), self.round(rope, "bf16")), -1)

    def round(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        """`x` as the element type holds it, in the compute type."""
        if not self.rounding or not x.is_floating_point() or dtype not in TORCH:
            return x
        return x.to(TORCH[dtype]).to(self.compute)

    def group(self, axis: str) -> Group:
        """The ranks along a mesh axis; raises ValueError without peers."""
        if self._peers is None:
            raise ValueError("the module is sharded: its ranks are evaluated together (spmd.run_ranks)")
        return self._peers.group(axis)

    def replicas(self, layer: int, experts: int, slots: int) -> Replicas:
        """The slots of a layer, counted from the first that has experts."""
        return replicas_of(self.module, layer, experts, slots)

    def call(self, function: Function, args: Sequence[Any]) -> list[Any]:
        """Results of one function for tensors, caches (tensors, changed in place) and layer indices."""
        env: dict[Value, Any] = dict(zip(function.args, args, strict=True))
        for op in function.ops:
            try:
                inputs = [self._operand(o, env) for o in op.operands]
                results = [self._store(v, r.type) for v, r in zip(self._run(op, inputs), op.results, strict=True)]
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                raise EvaluationError(function=function.name, op=print_op(op), reason=error) from error
            env.update(zip(op.results, results, strict=True))
            if self._trace is not None:
                self._trace(function, op, [self._logical(r) for r in results])
        return [self._logical(env[v]) for v in function.returns]

    def product(self, x: Any, w: torch.Tensor) -> torch.Tensor:
        """`x · wᵀ` in the compute type, or summed as `accumulate` says when x is quantised."""
        if self.fraction_bits is not None and isinstance(x, Quantised):
            given = x.dequantise(self.compute)
            return hopper_product(given, w, self.promote, self.fraction_bits).to(self.compute)
        return logical(x, self.compute) @ w.T

    def _run(self, op: Op, inputs: list[Any]) -> list[Any]:
        rule = OPS[op.name]
        if not rule.takes_quantised:
            inputs = [self._logical(x) for x in inputs]
        return rule.evaluate(inputs, op.attrs, self)

    def _logical(self, x: Any) -> Any:
        """The tensor that a quantised value stands for; anything else as it is."""
        return x.dequantise(self.compute) if isinstance(x, Quantised) else x

    def _store(self, x: Any, type: Any) -> Any:
        if isinstance(type, TensorType) and type.quant is None and isinstance(x, torch.Tensor):
            return self.round(x.to(self.compute) if x.is_floating_point() else x, type.dtype)
        if isinstance(type, TensorType) and type.quant is not None and isinstance(x, torch.Tensor):
            # Rows that were moved about: quantising their values again gives the same ones.
            return quantise(x, type.dtype, type.quant.block, type.quant.scale)
        return x

    def _operand(self, operand: Value | WeightRef, env: dict[Value, Any]) -> Any:
        if isinstance(operand, Value):
            return env[operand]
        return self.weights.tensor(operand.name, tuple(env[i] for i in operand.indices), self.compute)
