"""Every family against transformers on configurations drawn anew: the definition, and the compiled artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_configs import FAMILIES, save_model

import moec
from moec.frontend.checkpoint import bind, open_checkpoint
from moec.ir import CacheType, Module, TensorType
from moec.ir.evaluate import Evaluator, Loader, WeightPrograms

BOUND = 1e-4
"""Greatest difference of logits in units of their standard deviation."""
LENGTH = 50
QUICK = ("deepseek_v32", "mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "phimoe", "granitemoe")
"""Families that between them use every kernel; the others' artifacts are compiled in the slow set."""
COMPILED = [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


def evaluated(ir: Module, load: Loader, ids: torch.Tensor) -> torch.Tensor:
    """Logits f64[T, V] of one sequence by the reference evaluator."""
    function, count = ir.functions["prefill"], len(ids)
    tokens = torch.arange(count, dtype=torch.int32)
    given: dict[str, Any] = {
        "ids": ids.int(), "seq": torch.zeros(count, dtype=torch.int32), "pos": tokens, "rows": tokens,
        "pages": torch.zeros(1, 1, dtype=torch.int32), "starts": torch.tensor([0, count], dtype=torch.int32),
    }  # fmt: skip
    evaluator = Evaluator(ir, WeightPrograms(ir, load), torch.float64, rounding=False)
    for arg in function.args:
        if isinstance(arg.type, CacheType):
            given[arg.name] = evaluator.new_cache(arg.type, {"P": 1})
    (logits,) = evaluator.call(function, [given[a.name] for a in function.args])
    assert isinstance(logits, torch.Tensor)
    return logits


def oracle(model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits
    assert isinstance(logits, torch.Tensor)
    return logits.numpy()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_definition_equals_transformers(family: str, number: int, seed: int, tmp_path: Path) -> None:
    """Every tensor of the checkpoint is used, and the definition's logits are those of transformers."""
    model = save_model(family, seed + number, tmp_path)
    traced, checkpoint = moec.trace(str(tmp_path)), open_checkpoint(tmp_path)
    assert bind(traced.ir, checkpoint) == []
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, LENGTH))
    expected = oracle(model, ids)[0]
    got = evaluated(traced.ir, checkpoint.load, torch.tensor(ids[0])).numpy()
    assert np.abs(got - expected).max() / expected.std() < BOUND / 2


def check_compiled(family: str, seed: int, folder: Path) -> None:
    """Whole prefill, prefill in chunks of 7, and decode at every step, two sequences at once."""
    model = save_model(family, seed, folder / "hf")
    plan = moec.trace(str(folder / "hf")).optimize("cpu", batch=2, context=64, chunk=32, recipe="fp32")
    artifact = moec.load(plan.compile(folder / "m.moec").path)
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, LENGTH))
    expected = oracle(model, ids)
    for chunk in (None, 7, 1):
        got = artifact.logits(ids, chunk=chunk)
        assert np.abs(got - expected).max() / expected.std() < BOUND, f"chunk={chunk}"


@pytest.mark.parametrize("family", COMPILED)
def test_artifact_equals_transformers(family: str, seed: int, tmp_path: Path) -> None:
    check_compiled(family, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_more_artifacts_equal_transformers(family: str, number: int, seed: int, tmp_path: Path) -> None:
    check_compiled(family, seed + number, tmp_path)


@pytest.mark.parametrize(("family", "exact"), [("qwen2_moe", "shared_gate"), ("deepseek_v32", "indexer.weights")])
def test_gates_stay_exact(family: str, exact: str, tmp_path: Path) -> None:
    save_model(family, 4, tmp_path)
    plan = moec.trace(str(tmp_path)).optimize("cpu", context=64, recipe="weight-only")
    found = [w for w in plan.ir.weights.values() if exact in w.name]
    assert found and all(isinstance(w.type, TensorType) and w.type.dtype == "f32" for w in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_weights_stay_close(family: str, seed: int, tmp_path: Path) -> None:
    """The FP8 recipe's program moves the logits by its weights' rounding: 4 bits of mantissa, over some layers."""
    model = save_model(family, seed, tmp_path)
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, LENGTH))
    expected = oracle(model, ids)[0]
    plan = moec.trace(str(tmp_path)).optimize("cpu", context=64, recipe="weight-only")
    checkpoint = open_checkpoint(tmp_path)
    bind(plan.ir, checkpoint)
    got = evaluated(plan.ir, checkpoint.load, torch.tensor(ids[0])).numpy()
    # A token whose experts change with the rounding is not typical: the median over tokens counts. Nor is one that
    # attends to other positions because of it: with an indexer only tokens that see no more than it chooses count.
    error = np.sqrt(((got - expected) ** 2).mean(-1)) / expected.std()
    error = error[: getattr(model.config, "index_topk", LENGTH)]
    print(f"{family}: relative error {np.median(error):.3f}")
    assert 0.001 < np.median(error) < 0.3
