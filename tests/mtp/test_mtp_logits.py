"""The multi-token-prediction module: its definition, its passes and its kernels against a forward pass of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mtp_oracle import FOLDER, Oracle, add_module
from small_models import save_model
from transformers import AutoModelForCausalLM

import moec
from moec import targets
from moec.errors import InputError
from moec.frontend.checkpoint import bind, open_checkpoint
from moec.frontend.trace import NoDraftModule
from moec.ir import Module, TensorType, parse_module, print_module, verify
from moec.ir.evaluate import Evaluator, WeightPrograms
from moec.passes.base import Context, Limits
from moec.passes.manager import Manager
from moec.passes.pipeline import pipeline
from moec.runtime import Model
from moec.stages import DraftsOfRanks, WrongDrafts


def hidden_states(folder: Path, ids: Any) -> torch.Tensor:
    """f64[T, H]: what transformers has behind the main model's last norm."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    with torch.no_grad():
        states: torch.Tensor = model.model(torch.as_tensor(ids)[None]).last_hidden_state[0]
    return states


def evaluated(module: Module, load: Any, ids: list[int], calls: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden f64[T, H], logits f64[T - 1, V]) of the reference evaluator, the draft in calls of so many tokens."""
    evaluator = Evaluator(module, WeightPrograms(module, load), torch.float64, rounding=False)
    prefill, draft = module.functions["prefill"], module.functions["draft"]
    cache = evaluator.new_cache(prefill.args[-1].type, {"P": 1})  # type: ignore[arg-type]

    def place(begin: int, end: int, tokens: list[int]) -> list[torch.Tensor]:
        count = end - begin
        pos = torch.arange(begin, end, dtype=torch.int32)
        out = [torch.tensor(tokens, dtype=torch.int32), torch.zeros(count, dtype=torch.int32), pos]
        out += [torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, end], dtype=torch.int32)]
        return [*out, torch.arange(count, dtype=torch.int32)]

    _, hidden = evaluator.call(prefill, [*place(0, len(ids), ids), cache])
    rows, begin = [], 0
    for count in calls:
        inputs = place(begin, begin + count, ids[begin + 1 : begin + count + 1])
        rows.append(evaluator.call(draft, [*inputs, hidden[begin : begin + count], cache])[0])
        begin += count
    return hidden, torch.cat(rows)


VARIANTS = ("v3", "no-query-rank", "odd-sizes", "half-split-rope", "no-dense-tied", "block-sizes")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_definition_equals_the_paper(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path, seed=2)
    add_module(tmp_path, seed=3)
    ids = np.random.default_rng(4).integers(0, 211, 17).tolist()
    module = moec.trace(str(tmp_path), mtp=True).ir
    checkpoint = open_checkpoint(tmp_path)
    assert not any("multi-token" in note for note in bind(module, checkpoint))
    verify(module)
    hidden, logits = evaluated(module, checkpoint.load, ids, [9, 1, 4, 2])
    expected = Oracle(tmp_path).logits(hidden_states(tmp_path, ids), torch.tensor(ids))
    assert hidden.shape == (17, module.functions["prefill"].returns[1].type.shape[1])  # type: ignore[union-attr]
    # The embedded tables of angles are float32.
    assert (logits - expected).abs().max() < 1e-5 * expected.std()


def test_passes_keep_the_module_and_its_numbers() -> None:
    """The CPU pipeline with every pass evaluated on both entries and the draft; the text parses back."""
    traced = moec.trace(str(FOLDER), mtp=True)
    target = targets.load("cpu")
    module = moec.trace(str(FOLDER), mtp=True).ir
    manager = Manager(Context(target, Limits(2, 128, 64, 2)), "numerics", False, None)
    manager.run(module, pipeline(target, "fp32"))
    assert list(module.functions)[-1] == "draft"
    text = print_module(module)
    assert print_module(parse_module(text)) == text
    assert {op.name for _, op in module.ops()} >= {"attn.mla_absorbed", "norm.add_rms"}
    hidden = next(a.type for a in module.functions["draft"].args if a.name == "hidden")
    assert isinstance(hidden, TensorType) and hidden.dtype == "f32"
    head = traced.optimize("cpu", recipe="weight-only").ir
    assert str(head.weights["mtp.e_proj"].type).startswith("fp8_e4m3")


@pytest.mark.parametrize("chunk", [40, 256])
def test_kernels_equal_the_paper(model: Model, heldout: list[int], chunk: int) -> None:
    """Prompts in several chunks and in one, both sequences of a batch."""
    ids = np.array([heldout[:300], heldout[300:600]])
    model.engine.chunk = chunk
    try:
        got = model.draft_logits(ids)
    finally:
        model.engine.chunk = 256
    for row, tokens in enumerate(ids):
        expected = Oracle(FOLDER).logits(hidden_states(FOLDER, tokens), torch.tensor(tokens)).numpy()
        assert np.abs(got[row] - expected).max() < 1e-4 * expected.std()


def test_the_main_model_gives_the_same_logits_with_and_without_the_module(model: Model, heldout: list[int]) -> None:
    ids = np.array([heldout[:200]])
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    for chunk in (None, 1):
        assert np.abs(model.logits(ids, chunk=chunk) - expected).max() < 1e-4 * expected.std()


def test_what_has_no_module_says_so() -> None:
    with pytest.raises(NoDraftModule, match="kimi-k2: the model has no multi-token-prediction module"):
        moec.trace("kimi-k2", mtp=True)
    with pytest.raises(NoDraftModule, match="of mixtral models is not declared; leave --mtp away"):
        moec.trace("mixtral-8x7b", mtp=True)
    traced = moec.trace("tiny-deepseek-v3")
    with pytest.raises(WrongDrafts, match="--mtp 2: the drafted tokens of a step must be 0: the model was traced"):
        traced.optimize("cpu", drafts=2)
    with pytest.raises(WrongDrafts, match="--mtp 9: the drafted tokens of a step must be 1 to 8"):
        moec.trace("tiny-deepseek-v3", mtp=True).optimize("cpu", drafts=9)
    from moec.passes.planning.layout import LayoutRequest

    with pytest.raises(DraftsOfRanks, match="runs in one process"):
        moec.trace("tiny-deepseek-v3", mtp=True).optimize("cpu", layout=LayoutRequest(ranks=2))


def test_a_model_whose_checkpoint_lacks_the_module_names_the_tensor(tmp_path: Path) -> None:
    import json

    save_model("v3", tmp_path / "hf", seed=2)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_nextn_predict_layers": 1}))
    with pytest.raises(InputError, match=r"tensor model\.layers\.3\.\S+ is missing"):
        moec.trace(str(tmp_path / "hf"), mtp=True).optimize("cpu").compile(tmp_path / "m.moec")
    assert not (tmp_path / "m.moec").exists()
