"""Models declared in a Python file: traced, compiled and equal to the reference evaluator; recipes on awkward sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import save_model

import moec
from moec.compare import compare
from moec.errors import InputError
from moec.frontend.checkpoint import RandomWeights
from moec.ir.evaluate import Evaluator, WeightPrograms

EXAMPLE = Path(__file__).parents[2] / "examples" / "parallel_block.py"


def test_declared_model_equals_its_evaluation(tmp_path: Path) -> None:
    traced = moec.trace(f"{EXAMPLE}:ParallelBlock")
    plan = traced.optimize("cpu", context=64, chunk=32, recipe="fp32")
    model = moec.load(plan.compile(tmp_path / "m.moec", random_weights=3).path)
    ids = np.arange(20) * 7 % 512
    evaluator = Evaluator(traced.ir, WeightPrograms(traced.ir, RandomWeights(3).load), torch.float64, rounding=False)
    entry = traced.ir.functions["prefill"]
    tokens = torch.arange(20, dtype=torch.int32)
    inputs = [torch.tensor(ids, dtype=torch.int32), torch.zeros(20, dtype=torch.int32), tokens]
    inputs += [torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 20], dtype=torch.int32), tokens]
    cache = evaluator.new_cache(entry.args[-1].type, {"P": 1})  # type: ignore[arg-type]
    expected = evaluator.call(entry, [*inputs, cache])[0].numpy()
    # The declared weights are bf16; the fp32 recipe widens them exactly.
    got = model.logits(ids[None])[0]
    assert np.abs(got - expected).max() / expected.std() < 1e-4


@pytest.mark.parametrize("recipe", ["bf16", "weight-only"])
def test_recipes_on_sizes_that_fit_no_block(recipe: str, tmp_path: Path) -> None:
    """Every op of the artifact equals the reference on the same quantised weights."""
    save_model("odd-sizes", tmp_path / "hf", seed=5)
    plan = moec.trace(str(tmp_path / "hf")).optimize("cpu", context=64, chunk=32, recipe=recipe)
    model = moec.load(plan.compile(tmp_path / "m.moec").path)
    result = compare(model, tmp_path / "hf", list(range(3, 30)))
    assert not result.departures, result.departures[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "declares no model class"),
        ("import nothing_like_this", "ModuleNotFoundError"),
        ("Model = 3", "no model class"),
    ],
)
def test_wrong_definitions_cost_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        moec.trace(f"{file}:Model")
    with pytest.raises(InputError, match="no such file"):
        moec.trace(f"{tmp_path}/other.py:Model")
