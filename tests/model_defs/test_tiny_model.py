"""The embedded tiny-deepseek-v3: that it is what its card says, read by transformers and not by this project."""

from __future__ import annotations

import importlib
import json
import lzma
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

import moec.model_defs

FOLDER = Path(moec.model_defs.__file__).parent / "presets_data" / "tiny-deepseek-v3"
EXAMPLES = Path(__file__).parents[2] / "examples"
WINDOW = 512
PROMPT = "class Queue:\n    def __init__(self"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
    return content


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, dict[str, Any]]:
    """The main model in float32, and what transformers found missing or unexpected."""
    torch.set_num_threads(1)
    model, info = DeepseekV3ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    # transformers finds MTP tensors by this list, which knows the 61 layers of the published model only.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\..*"]
    return model.eval(), info


@pytest.fixture(scope="module")
def card() -> dict[str, float]:
    """Metrics of the model card's front matter."""
    _, front, _ = (FOLDER / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metrics = yaml.safe_load(front)["model-index"][0]["results"][0]["metrics"]
    return {metric["type"]: metric["value"] for metric in metrics}


def test_transformers_misses_no_tensor_and_meets_only_the_mtp_layer_unexpectedly(
    loaded: tuple[Any, dict[str, Any]], config: dict[str, Any]
) -> None:
    info = loaded[1]
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    assert all(name.startswith(f"model.layers.{config['num_hidden_layers']}.") for name in info["unexpected_keys"])


def test_size_and_types(tensors: dict[str, torch.Tensor]) -> None:
    assert 3e6 <= sum(tensor.numel() for tensor in tensors.values()) <= 5e6
    wide = {name for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
    assert wide == {name for name in tensors if name.endswith("gate.e_score_correction_bias")}
    assert all(tensors[name].dtype == torch.float32 for name in wide)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12e6


def test_the_mtp_module_is_stored_as_the_layer_after_the_last(
    tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    layers = config["num_hidden_layers"]
    assert config["num_nextn_predict_layers"] == 1
    extra = f"model.layers.{layers}."
    last_layer = {n for n in tensors if n.startswith(f"model.layers.{layers - 1}.")}
    own = ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens")
    expected = {name.replace(f"layers.{layers - 1}.", f"layers.{layers}.") for name in last_layer}
    expected |= {f"{extra}{name}.weight" for name in own}
    assert {name for name in tensors if name.startswith(extra)} == expected
    assert torch.equal(tensors[extra + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[extra + "shared_head.head.weight"], tensors["lm_head.weight"])
    hidden = config["hidden_size"]
    assert tensors[extra + "eh_proj.weight"].shape == (hidden, 2 * hidden)


@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_every_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert all(0 <= token < len(tokenizer) for token in ids)
    assert tokenizer.decode(ids) == text


def test_every_byte_has_a_token_and_the_excerpt_survives(tokenizer: Any, config: dict[str, Any]) -> None:
    text = (FOLDER / "heldout.txt").read_bytes().decode()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    alphabet = bytes(range(128)).decode() + "".join(chr(0x80 + i) for i in range(64)) + "\u07ff\uffff\U0010ffff"
    assert tokenizer.decode(tokenizer(alphabet).input_ids) == alphabet
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.convert_tokens_to_ids("<|end_of_text|>") == config["eos_token_id"]


@pytest.fixture(scope="module")
def read(loaded: tuple[Any, dict[str, Any]], tokenizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The excerpt in windows as the card describes (int64[1, L+1], one shared token, end-of-text first), each with
    the main model's hidden states [1, L, H] after its last norm."""
    text = (FOLDER / "heldout.txt").read_bytes().decode()
    stream = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
    windows = [stream[:, start : start + WINDOW + 1] for start in range(0, stream.shape[1] - 1, WINDOW)]
    with torch.no_grad():
        return [(ids, loaded[0].model(ids[:, :-1]).last_hidden_state) for ids in windows]


@torch.no_grad()
def test_the_cards_loss_is_reproduced_and_beats_a_compressor(
    loaded: tuple[Any, dict[str, Any]],
    read: list[tuple[torch.Tensor, torch.Tensor]],
    card: dict[str, float],
) -> None:
    head = loaded[0].lm_head
    nats = sum(F.cross_entropy(head(h)[0], ids[0, 1:], reduction="sum").item() for ids, h in read)
    loss = nats / sum(hidden.shape[1] for _, hidden in read)
    text = (FOLDER / "heldout.txt").read_bytes()
    bits = nats / math.log(2) / len(text)
    assert loss == pytest.approx(card["loss"], rel=1e-3)
    assert math.exp(loss) == pytest.approx(card["perplexity"], rel=1e-2)
    assert bits == pytest.approx(card["bits_per_byte"], rel=1e-3)
    assert bits < 8 * len(lzma.compress(text, preset=9)) / len(text)


@torch.no_grad()
def test_mtp_drafts_what_the_card_says(
    loaded: tuple[Any, dict[str, Any]],
    read: list[tuple[torch.Tensor, torch.Tensor]],
    card: dict[str, float],
) -> None:
    mtp, head = MtpModel.from_pretrained(loaded[0]).eval(), loaded[0].lm_head
    agree, right, count = 0, 0, 0
    for ids, hidden in read:
        positions = torch.arange(1, ids.shape[1])[None]
        ahead = mtp.forward_layer(0, hidden, positions, None, input_ids=ids[:, 1:])
        drafts, picks = head(ahead)[0].argmax(-1), head(hidden)[0].argmax(-1)
        agree += int((drafts[:-1] == picks[1:]).sum())
        right += int((drafts[:-1] == ids[0, 2:]).sum())
        count += len(picks) - 1
    assert agree / count == pytest.approx(card["mtp_agreement"], abs=0.005)
    assert right / count == pytest.approx(card["mtp_accuracy"], abs=0.005)


def test_greedy_text_is_the_same_again_and_with_mtp_drafts(loaded: tuple[Any, dict[str, Any]], tokenizer: Any) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    plain = loaded[0].generate(ids, **options)
    assert torch.equal(loaded[0].generate(ids, **options), plain)
    assert torch.equal(loaded[0].generate(ids, use_mtp=True, **options), plain)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_tiny")


@pytest.fixture
def corpus(script: Any, tmp_path: Path) -> Any:
    """Two hundred small modules; more than one is held out by the hash of its name."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(200):
        body = f"def scale_{number}(value: int) -> int:\n    return value * {number}\n\n\n" * 4
        (folder / f"part_{number}.py").write_text(body)
    return script.Corpus.read(folder)


def trained(script: Any, corpus: Any, checkpoint: Path, seed: int, stops: tuple[int, ...]) -> Any:
    """A trainer of two steps in all, stopped and resumed from the checkpoint at each of `stops`."""
    recipe = script.Recipe(steps=2, seed=seed, tokens_per_step=128, length=64)
    for stop in (*stops, recipe.steps):
        trainer, _ = script.prepare(recipe, corpus)
        if stop != (*stops, recipe.steps)[0]:
            trainer.load(checkpoint)
        while trainer.step < stop:
            trainer.advance()
        trainer.save(checkpoint)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = trainer.network.modules.state_dict()
    return state


def test_same_seed_same_weights_also_when_resumed(script: Any, corpus: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    first = weights(trained(script, corpus, tmp_path / "a", seed=1, stops=()))
    again = weights(trained(script, corpus, tmp_path / "b", seed=1, stops=(1,)))
    other = weights(trained(script, corpus, tmp_path / "c", seed=2, stops=()))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["main.lm_head.weight"], other["main.lm_head.weight"])
    biases = [value for name, value in first.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3 and all(bool(value.any()) for value in biases)


def test_recipes_of_different_length_agree_until_the_shorter_one_decays(script: Any) -> None:
    """What resuming with another number of steps rests on."""
    short, long = script.Recipe(steps=200, seed=1), script.Recipe(steps=1000, seed=1)
    tokens = torch.arange(5000)
    for step in (0, 50, 120, short.decay_start - 1):
        assert short.rate(step) == long.rate(step)
        assert torch.equal(script.batch(tokens, short, step), script.batch(tokens, long, step))
    assert short.rate(short.decay_start + 20) == pytest.approx(short.peak_rate / 2)


def test_resuming_with_another_seed_is_refused(script: Any, corpus: Any, tmp_path: Path) -> None:
    recipes = [script.Recipe(steps=2, seed=seed) for seed in (1, 3)]
    first, other = (script.prepare(recipe, corpus)[0] for recipe in recipes)
    first.save(tmp_path / "a")
    with pytest.raises(SystemExit, match=re.escape("another text, recipe or decay at step 0")):
        other.load(tmp_path / "a")


def test_export_reads_back_rounded_to_bf16(script: Any, corpus: Any, tmp_path: Path) -> None:
    export = importlib.import_module("export_tiny")
    trainer, tokenizer = script.prepare(script.Recipe(steps=1, seed=1), corpus)
    network = trainer.network
    export.write_model(tmp_path / "out", network.main, network.mtp, tokenizer, script.END)
    main, mtp = export.read_model(tmp_path / "out")
    for read, written in ((main, network.main), (mtp.layers, network.mtp.layers)):
        state = written.state_dict()
        assert read.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name].bfloat16().float()) for name, value in read.state_dict().items())
    assert not (tmp_path / "out.partial").exists()
