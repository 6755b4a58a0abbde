"""The reference evaluator against transformers, and the forms of attention against each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.frontend.checkpoint import bind, open_checkpoint
from moec.ir import Module
from moec.ir.evaluate import Evaluator, WeightPrograms
from moec.ir.rewrite import clone_module
from moec.passes.base import Context, Limits, Pass
from moec.passes.mla_absorb import MlaAbsorb
from moec.passes.share_heads import ShareHeads
from moec.targets import load

sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))
from small_models import VARIANTS, save_model

SEQUENCES, LENGTH = 2, 40


class Run:
    """Feeds two sequences to a module in pieces, over one cache of several pages."""

    def __init__(self, module: Module, weights: WeightPrograms, compute: torch.dtype) -> None:
        self.module = module
        self.evaluator = Evaluator(module, weights, compute, rounding=False)
        self.kv: torch.Tensor | None = None
        self.used = 0

    def __call__(self, phase: str, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[sequences, tokens, vocabulary]` of the next tokens of every sequence."""
        function = self.module.functions[phase]
        count = ids.shape[1]
        if self.kv is None:
            self.kv = self.evaluator.new_cache(function.args[6].type, {"P": SEQUENCES})  # type: ignore[arg-type]
        pos = torch.arange(self.used, self.used + count).repeat(SEQUENCES)
        self.used += count
        args: list[Any] = [
            ids.flatten().int(),
            torch.arange(SEQUENCES).repeat_interleave(count),
            pos,
            torch.arange(SEQUENCES).flip(0)[:, None],
            torch.arange(SEQUENCES + 1) * self.used,
            torch.arange(ids.numel()),
            self.kv,
        ]
        (logits,) = self.evaluator.call(function, args)
        return logits.unflatten(0, (SEQUENCES, count))  # type: ignore[no-any-return]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("variant", VARIANTS)
def test_imported_ir_equals_transformers(variant: str, tmp_path: Path) -> None:
    """Logits to 1e-5 in FP32 with the same weights; absorbed equals plain to 1e-9 in FP64, also from a shared matrix.

    Folded weights are stored in FP32: to 1e-6. All in one prefill, in a prefill over a cached prefix, and in decode of
    one token and of several.
    """
    oracle = save_model(variant, tmp_path, seed=7)
    module = moec.trace(str(tmp_path)).ir
    checkpoint = open_checkpoint(tmp_path)
    bind(module, checkpoint)
    weights = WeightPrograms(module, checkpoint.load)
    ids = torch.randint(0, 211, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = oracle(ids).logits
    assert relative(Run(module, weights, torch.float32)("prefill", ids), expected) < 1e-5

    context = Context(load("h800"), Limits(SEQUENCES, 64, 32))

    def form(*passes: Pass) -> Run:
        changed = clone_module(module)
        for step in passes:
            assert step.run(changed, context).matched
        return Run(changed, WeightPrograms(changed, checkpoint.load), torch.float64)

    plain = Run(module, weights, torch.float64)
    others = [
        (form(MlaAbsorb(prefill="absorbed", decode="absorbed", fold="never")), 1e-9),
        (form(MlaAbsorb(prefill="plain", decode="absorbed", fold="never"), ShareHeads()), 1e-9),
        (form(MlaAbsorb(prefill="absorbed", decode="absorbed", fold="always")), 1e-6),
    ]
    at = 0
    for phase, count in (("prefill", 20), ("prefill", 13), ("decode", 1), ("decode", 4), ("decode", 2)):
        piece = ids[:, at : at + count]
        a = plain(phase, piece)
        assert relative(a.float(), expected[:, at : at + count]) < 1e-5
        for other, bound in others:
            assert relative(other(phase, piece), a) < bound
        at += count
    assert at == LENGTH
