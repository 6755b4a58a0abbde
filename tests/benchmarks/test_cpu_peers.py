"""benchmarks/cpu_peers.py: the peers compute one model, its operations and bytes, the report, wrong options."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from moec.errors import InputError
from moec.frontend import find_model

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64,
    "v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "vocab_size": 160,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {"routed_scaling_factor": 1.5},
    # llama.cpp expects models without a query rank to have 27 layers.
    "no-query-rank": {"q_lora_rank": None, "n_shared_experts": 1, "num_hidden_layers": 27},
    "groups": {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 2},
    "not-normalised": {"norm_topk_prob": False, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def peer() -> Iterator[Any]:
    """The modules of benchmarks/peers by name."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    patch.undo()


def config(variant: str) -> Any:
    """The parsed configuration of a variant."""
    given = {**SIZES, **VARIANTS[variant]}
    return find_model("bench-4b", {key: json.dumps(value) for key, value in given.items()})


def reference(source: Any) -> Any:
    """The same configuration in transformers, with weights that are all zero."""
    settings = transformers.DeepseekV3Config(**source.raw)
    settings._experts_implementation = "eager"
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(settings)
    model = model.float().to_empty(device="cpu").eval()
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    return model


def from_gguf(path: Path, model: Any) -> None:
    """Copy a GGUF file's weights into a transformers model: every tensor of one must be in the other."""
    import gguf

    read = {
        t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type)))
        for t in gguf.GGUFReader(path).tensors
    }
    names = {
        "self_attn.o_proj": "attn_output", "self_attn.q_proj": "attn_q", "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
        "mlp.shared_experts.down_proj": "ffn_down_shexp",
    }  # fmt: skip
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    state = {}
    for key in model.state_dict():
        stem, layer, rest = key.removesuffix(".weight"), "", ""
        if key.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
        prefix = f"blk.{layer}."
        if rest == "self_attn.kv_b_proj":
            k, v = read.pop(f"{prefix}attn_k_b.weight"), read.pop(f"{prefix}attn_v_b.weight")
            state[key] = torch.cat([k.transpose(1, 2), v], 1).flatten(0, 1)
        elif rest == "mlp.experts.gate_up_proj":
            parts = [read.pop(f"{prefix}ffn_{name}_exps.weight") for name in ("gate", "up")]
            state[key] = torch.cat(parts, 1)
        elif rest == "mlp.experts.down_proj":
            state[key] = read.pop(f"{prefix}ffn_down_exps.weight")
        elif rest == "mlp.gate.e_score_correction_bias":
            state[key] = read.pop(f"{prefix}exp_probs_b.bias")
        elif stem in whole:
            tied = stem == "lm_head" and "output.weight" not in read
            state[key] = state["model.embed_tokens.weight"] if tied else read.pop(f"{whole[stem]}.weight")
        else:
            state[key] = read.pop(f"{prefix}{names[rest]}.weight")
    assert not read
    model.load_state_dict(state)


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("fmt", ["Q8_0", "Q4_0"])
def test_llama_cpp_computes_the_model(peer: Any, tmp_path: Path, variant: str, fmt: str) -> None:
    """Its logits are those of transformers with the file's weights, up to its 8-bit activations and 16-bit cache."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    source = config(variant)
    path = tmp_path / "model.gguf"
    peer("peers.gguf_model").write(path, source.config, fmt, seed=3)
    model = reference(source)
    from_gguf(path, model)
    ids = np.random.default_rng(5).integers(0, SIZES["vocab_size"], 12)
    runners = peer("peers.runners")
    llama = runners.Llama(runners.Settings("", False, str(path), threads=1, tokens=256, prompt=12, batch=2))
    heard: list[int] = []
    llama.generate(ids, 1, lambda: heard.append(1))
    with torch.inference_mode():
        wanted = model(torch.from_numpy(ids)[None]).logits[0, -1].double()
    found = torch.from_numpy(llama.logits().copy()).double()
    assert heard == [1]
    # Two sequences together, the first of them this one: the same logits before the first step.
    llama.generate_all(np.stack([ids[::-1], ids]), 1, lambda: heard.append(2))
    assert heard == [1, 2]
    assert (torch.from_numpy(llama.logits().copy()).double() - found).norm() < 1e-3 * found.norm()
    assert (found - wanted).norm() < 0.08 * wanted.norm()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_counts_of_weights_and_operations(peer: Any, variant: str) -> None:
    geometry, source = peer("peers.geometry"), config(variant)
    model = reference(source)
    biases = sum(b.numel() for name, b in model.named_buffers() if "e_score_correction_bias" in name)
    parameters = sum(p.numel() for p in model.parameters()) + biases
    assert geometry.parameters(source.config) == parameters
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros((1, 1), dtype=torch.int64))
    assert geometry.prefill_operations(source.config, 1) == counter.get_total_flops()
    assert geometry.step_bytes(source.config, 4) < 4 * parameters


def test_a_step_reads_all_but_the_embedding_when_all_experts_are_chosen(peer: Any) -> None:
    geometry, source = peer("peers.geometry"), find_model("bench-4b", {"num_experts_per_tok": "64"})
    c = source.config
    rest = geometry.parameters(c) - (c.vocab_size - 1) * c.hidden_size
    assert geometry.step_bytes(c, 4) == pytest.approx(4 * rest, rel=1e-12)


def test_attention_reads_what_transformers_caches(peer: Any) -> None:
    geometry, source = peer("peers.geometry"), config("v3")
    with torch.inference_mode():
        cache = reference(source)(torch.zeros((1, 7), dtype=torch.int64), use_cache=True).past_key_values
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert geometry.attention_step(source.config, 7, element=4)[0] == held


def test_report_takes_medians_and_ratios(peer: Any) -> None:
    worker, report, limits = peer("peers.worker"), peer("peers.report"), peer("peers.limits").Limits(2, 30e9, 200e9)
    c = find_model("bench-4b").config

    def runs(rates: list[float]) -> list[Any]:
        return [worker.Measured({256: 10 * r}, {128: r}, {4: 2 * r}, 1.0, 2.0, 1 << 30) for r in rates]

    rows = report.rows(c, limits, {"moec": runs([30.0, 10.0, 20.0]), "llama-q8": runs([10.0, 9.0, 11.0])})
    assert [row.decode[128].median for row in rows.values()] == [20.0, 10.0]
    assert rows["moec"].decode[128].first_over_this == 1.0
    assert rows["llama-q8"].prefill[256].first_over_this == pytest.approx(20 / 11)
    # Four sequences share what all of them read.
    for row in rows.values():
        assert row.decode[128].bound < row.batched[4].bound < 4 * row.decode[128].bound
    # One token cannot come faster than its weights.
    for row in rows.values():
        assert row.decode[128].bound < limits.bandwidth / row.step_weight_bytes
    text = report.table(limits, rows)
    assert "decode at context 128" in text and "llama.cpp Q8_0" in text
    json.dumps(report.as_json({"model": "bench-4b"}, limits, rows))


def test_small_run_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = run(
        "--small",
        "--peers",
        "moec",
        "--batch",
        "3",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--work",
        str(tmp_path),
        "--json",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    moec = found["peers"]["moec"]
    assert found["limits"]["bandwidth"] > 0 and found["limits"]["peak"] > 0
    assert len(moec["prefill"]["16"]["rounds"]) == len(moec["decode"]["16"]["rounds"]) == 1
    assert moec["decode"]["16"]["median"] > 0
    assert moec["batched"]["3"]["median"] > 0
    assert "decode at context 16" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--peers", "llama-q9"], "no peer 'llama-q9' (did you mean llama-q8, llama-q4?)"),
        (["--context", "many"], "--context many: integers from 1 to 32766, separated by commas"),
        (["--small", "--prefill", "8,5000"], "--prefill 8,5000: integers from 1 to 4096, separated by commas"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
    ],
)
def test_wrong_options_give_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    done = run(*arguments, "--work", str(tmp_path / "work"))
    assert done.returncode == 2
    assert done.stderr.strip() == line
    assert not (tmp_path / "work").exists()


def test_absent_package_is_named(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = peer("peers.registry")
    monkeypatch.setattr(registry, "installed", lambda module: module != "llama_cpp")
    with pytest.raises(InputError, match=r"^peer llama-q4 needs llama-cpp-python: pip install llama-cpp-python$"):
        registry.chosen("moec,llama-q4")
    assert "llama-q8" not in registry.chosen(None)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process."""
    command = [sys.executable, str(FOLDER / "cpu_peers.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)
