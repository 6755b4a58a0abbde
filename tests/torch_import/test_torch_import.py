"""Modules of torch imported without a declaration: logits, what was raised, the declared model's plan, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imported import IMPORTED, difference, module_of
from random_configs import FAMILIES, make_model
from torch import nn

import moec
from moec import targets
from moec.frontend.torch_import import TorchSource
from moec.frontend.torch_import.exported import DataDependent
from moec.frontend.torch_import.raising import NotRaised, Report
from moec.passes.planning import Options, make_plan
from moec.stages import Traced

BOUND = 5e-5
QUICK = ("llama", "qwen2_moe", "deepseek_v3")
PLANNED = [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in IMPORTED]


def report_of(traced: Traced) -> Report:
    assert isinstance(traced.source, TorchSource)
    return traced.source.report


@pytest.mark.parametrize("family", IMPORTED)
def test_undeclared_classes(family: str, seed: int) -> None:
    module = module_of(family, seed)
    traced = moec.trace(module)
    report = report_of(traced)
    print(f"{family}: {report}")
    assert report.share == 1.0
    assert difference(traced, module, seed) < BOUND


@pytest.mark.parametrize("family", PLANNED)
def test_plan_is_that_of_the_declared_model(family: str, seed: int, tmp_path: Path) -> None:
    """On an h800, within a tenth; equal layers are rolled up, and all layers are where they take turns."""
    module = module_of(family, seed)
    imported = moec.trace(module).ir
    module.save_pretrained(tmp_path)
    declared = moec.trace(str(tmp_path)).ir
    if not any(name.startswith("mixed") for name in declared.functions):
        assert len(list(imported.ops())) == len(list(declared.ops()))
    target = targets.load("h800")
    options = Options(batch=8, context=64, prompt=64, chunk=64)
    plans = [make_plan(ir, target, options) for ir in (imported, declared)]
    for phase in plans[0].phases:
        times = [p.phases[phase].serial_us for p in plans]
        assert times[0] == pytest.approx(times[1], rel=0.1)


def test_artifact_of_an_imported_module(seed: int, tmp_path: Path) -> None:
    module = module_of("mixtral", seed)
    plan = moec.trace(module).optimize("cpu", context=64, chunk=32, recipe="fp32")
    model = moec.load(plan.compile(tmp_path / "m.moec").path)
    ids = np.random.default_rng(seed).integers(0, module.config.vocab_size, (1, 40))
    with torch.no_grad():
        expected = module(torch.tensor(ids)).logits.numpy()
    for chunk in (None, 1):
        assert np.abs(model.logits(ids, chunk=chunk) - expected).max() / expected.std() < 1e-4


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_experts_grouped_after_sorting(family: str, seed: int) -> None:
    """The form that transformers takes for export by itself; gpt-oss has biases, and weights as [in, out]."""
    module = module_of(family, seed)
    module.config._experts_implementation = "grouped_mm"
    traced = moec.trace(module)
    assert report_of(traced).share == 1.0
    assert difference(traced, module, seed) < BOUND


def test_scaled_dot_product_attention(seed: int) -> None:
    module = module_of("mixtral", seed)
    module.config._attn_implementation = "sdpa"
    assert difference(moec.trace(module), module, seed) < BOUND


class Capped(nn.Module):
    """Logits bounded by a function that no pattern takes in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config: Any = inner.config

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = self.inner(input_ids, use_cache=False).logits
        assert isinstance(logits, torch.Tensor)
        return torch.tanh(logits / 3.0) * 3.0


def test_what_is_not_raised_stays_a_tensor_op_and_is_reported(seed: int) -> None:
    module = Capped(module_of("qwen3", seed))
    traced = moec.trace(module)
    report = report_of(traced)
    assert 0.9 < report.share < 1.0
    (line,) = report.plain
    assert "tanh" in line
    assert [op.name for op in traced.ir.functions["prefill"].ops][-2:] == ["tensor.pointwise", "scale"]
    assert difference(traced, module, seed) < BOUND


def test_loop_over_experts_that_were_hit() -> None:
    module = make_model("mixtral", 0)
    module.config._experts_implementation = "eager"
    with pytest.raises(DataDependent) as error:
        moec.trace(module)
    text = str(error.value)
    assert "model.layers.0.mlp.experts (MixtralExperts)" in text
    assert "repeat_interleave" in text and "batched_mm" in text
    assert "\n" not in text


def test_forms_that_are_not_known_are_named() -> None:
    """Sparse attention's mask depends on what is read."""
    module = make_model("deepseek_v32", 1)
    module.config._experts_implementation = "batched_mm"
    with pytest.raises(NotRaised, match=r"model\.layers\.0\.self_attn .*neither causal nor a window nor in chunks"):
        moec.trace(module)


def test_rotary_embeddings_that_depend_on_the_length_are_named() -> None:
    module = next(m for m in (make_model("phimoe", n) for n in range(40)) if rope_type(m) == "longrope")
    with pytest.raises(DataDependent, match=r"rotary_emb.*frequencies do not depend on how long the text is"):
        moec.trace(module)


def rope_type(module: Any) -> str:
    return str(module.config.rope_parameters["rope_type"])


def test_every_imported_family_is_declared() -> None:
    assert set(IMPORTED) < set(FAMILIES)
