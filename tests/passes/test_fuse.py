"""fuse: products of one input are joined where they read the same layer, and each pair of weights on its own."""

from __future__ import annotations

import pytest
import torch

from moec.ir import Module, parse_module, verify
from moec.ir.evaluate import Evaluator, WeightPrograms
from moec.passes.base import Context
from moec.passes.fuse import Fuse
from moec.targets import load


def weights(*names: str) -> str:
    load = 'weight.load {{tensor = "{{l}}.{0}", shape = [4, 8], dtype = f32}}'
    text = "  weight @{0}[l: 0..2]: f32[4, 8] {{\n    %0 = " + load + " : f32[4, 8]\n    return %0\n  }}\n"
    return "".join(text.format(name) for name in names)


def function(name: str, first: str, second: str) -> str:
    lines = [
        f"  func @{name}(%l: index, %m: index, %x: f32[T, 8]) -> f32[T, 4] {{",
        f"    %0 = linear %x, @{first} : f32[T, 4]",
        f"    %1 = linear %x, @{second} : f32[T, 4]",
        "    %2 = scale %1 {factor = 0.5} : f32[T, 4]",
        "    %3 = add %0, %2 : f32[T, 4]",
        "    return %3",
        "  }",
    ]
    return "\n".join(lines) + "\n"


def module(*parts: str) -> Module:
    return parse_module("module @m {version = 1} {\n" + "".join(parts) + "}\n")


def results(module: Module) -> list[torch.Tensor]:
    """What every function gives for layers 0 and 1."""

    def loader(name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode())))

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    evaluator = Evaluator(module, WeightPrograms(module, loader))
    return [evaluator.call(f, [0, 1, x])[0] for f in module.functions.values()]


@pytest.mark.parametrize(
    ("text", "products"),
    [
        ([weights("a.q", "a.k"), function("f", "a.q[%l]", "a.k[%l]")], [1]),
        ([weights("a.q", "a.k"), function("f", "a.q[%l]", "a.k[%m]")], [2]),
        (
            [weights("a.q", "b.k", "c.k"), function("f", "a.q[%l]", "b.k[%l]"), function("g", "a.q[%m]", "c.k[%m]")],
            [1, 1],
        ),
    ],
    ids=["one layer", "two layers", "names with the same end"],
)
def test_joined_products_give_the_same(text: list[str], products: list[int]) -> None:
    fused = module(*text)
    before = results(fused)
    Fuse().run(fused, Context(load("cpu")))
    verify(fused)
    assert [sum(op.name == "linear" for op in f.ops) for f in fused.functions.values()] == products
    for found, wanted in zip(results(fused), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
