"""What quantisation costs: signal-to-noise ratios of stored weights and of the products that read them. Needs torch.

The reference of a weight is the value that the checkpoint stands for, its own quantisation included: an FP8 checkpoint
that is kept as it is has no noise. Products are measured on standard normal rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch

from moec.ir.evaluate import Loader, WeightPrograms
from moec.ir.module import Module, Op, Value, Weight, WeightRef
from moec.ir.numeric import Quantised, logical, quantise
from moec.ir.optable import OPS
from moec.ir.types import TensorType

ROWS = 64
ROUNDING = ("weight.quantise", "weight.cast", "weight.pack")
PRODUCTS = {"linear": (1,), "linear.heads": (1,), "moe.experts": (2, 3)}


@dataclass(frozen=True)
class Noise:
    """A weight at one point of its indices: how it is stored, its ratio in dB and that of a product with it."""

    weight: str
    point: tuple[int, ...]
    stored: str
    input: str
    weight_db: float
    product_db: float

    def as_json(self) -> dict[str, Any]:
        """Plain data; a ratio without noise is null."""
        shown = {k: None if math.isinf(v) else round(v, 2) for k, v in self.ratios().items()}
        return {"weight": self.weight, "point": list(self.point), "stored": self.stored, "input": self.input, **shown}

    def ratios(self) -> dict[str, float]:
        """Both ratios by name."""
        return {"weight_db": self.weight_db, "product_db": self.product_db}


def sqnr_db(exact: torch.Tensor, stored: torch.Tensor) -> float:
    """10·log10(|exact|² / |exact - stored|²); infinite without noise."""
    noise = (exact.double() - stored.double()).square().sum().item()
    signal = exact.double().square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def measure(module: Module, loader: Loader, points: int = 4, only: set[str] | None = None) -> list[Noise]:
    """Noise of every weight of a product (or of `only` some), worst first, at up to `points` spaced index points."""
    programs = _Programs(module, loader)
    inputs = _inputs(module)
    found = []
    for name, x in inputs.items():
        if only is not None and name not in only:
            continue
        weight = module.weights[name]
        for point in spaced(weight, points):
            exact, stored = programs.both(name, point)
            found.append(_noise(weight, point, exact, stored, x))
    return sorted(found, key=lambda n: (n.product_db, n.weight_db))


def requantised(module: Module) -> list[str]:
    """Weights that are dequantised and quantised again by their programs."""
    found = []
    for weight in module.weights.values():
        names = [op.name for op in weight.program.ops]
        if ("weight.dequant", "weight.quantise") in pairwise(names):
            found.append(weight.name)
    return found


def spaced(weight: Weight, count: int) -> Iterator[tuple[int, ...]]:
    """Up to `count` evenly spaced index points."""
    every = list(product(*(range(start, stop) for _, start, stop in weight.indices)))
    if len(every) <= count:
        return iter(every)
    return iter([every[i * (len(every) - 1) // max(1, count - 1)] for i in range(count)])


def _inputs(module: Module) -> dict[str, TensorType]:
    """The type of what each weight of a product is multiplied with."""
    out: dict[str, TensorType] = {}
    for _, op in module.ops():
        for position in PRODUCTS.get(op.name, ()):
            ref, x = op.operands[position], op.operands[0].type
            if isinstance(ref, WeightRef) and isinstance(x, TensorType):
                out.setdefault(ref.name, x)
    return out


def _noise(weight: Weight, point: tuple[int, ...], exact: torch.Tensor, stored: torch.Tensor, x: TensorType) -> Noise:
    assert isinstance(weight.type, TensorType)
    rows = torch.randn(ROWS, exact.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    read = rows
    if x.quant is not None:
        read = quantise(rows.float(), x.dtype, x.quant.block[-2:], x.quant.scale).dequantise(torch.float64)
    elif x.dtype == "bf16":
        read = rows.bfloat16().double()
    db = sqnr_db(rows @ exact.mT, read @ stored.mT)
    stored_as = f"{weight.type.dtype} {weight.type.quant or ''}".strip()
    shown = f"{x.dtype} {x.quant or ''}".strip()
    return Noise(weight.name, point, stored_as, shown, sqnr_db(exact, stored), db)


class _Programs(WeightPrograms):
    """Weight programs run twice: as they are, and with every rounding left out."""

    def both(self, name: str, point: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The value that the checkpoint stands for and the stored one, in float64."""
        weight = self.module.weights[name]
        self._point = {i[0]: p for i, p in zip(weight.indices, point, strict=True)}
        return self._run(weight, point, exact=True), self._run(weight, point, exact=False)

    def _run(self, weight: Weight, point: tuple[int, ...], exact: bool) -> torch.Tensor:
        env: dict[Value, Any] = dict(zip(weight.program.args, point, strict=True))
        for op in weight.program.ops:
            inputs = [env[o] for o in op.operands if isinstance(o, Value)]
            env.update(zip(op.results, self._op(op, inputs, exact), strict=True))
        return logical(env[weight.program.returns[0]], torch.float64)

    def _op(self, op: Op, inputs: list[Any], exact: bool) -> list[Any]:
        if not exact:
            return OPS[op.name].evaluate(inputs, op.attrs, self)
        if op.name in ROUNDING:
            return inputs
        if op.name == "weight.dequant":
            return [x.dequantise(torch.float64) if isinstance(x, Quantised) else x for x in inputs]
        return OPS[op.name].evaluate(inputs, op.attrs, self)
