"""Forms of latent attention: equal results, and a choice that moves the right way with batch, context and bandwidth."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import save_model

import moec
from moec import targets
from moec.ir import Module
from moec.ir.rewrite import clone_module
from moec.passes.base import Context, Limits, Outcome, PassError
from moec.passes.mla_absorb import MlaAbsorb
from moec.passes.share_heads import ShareHeads


@pytest.fixture(scope="module")
def deepseek() -> Module:
    return moec.trace("deepseek-v3").ir


def decide(module: Module, target: targets.Target, limits: Limits, **options: object) -> Outcome:
    return MlaAbsorb(**options).run(clone_module(module), Context(target, limits))  # type: ignore[arg-type]


def form(outcome: Outcome, phase: str) -> str:
    (note,) = [n for n in outcome.notes if n.startswith(f"@moe_layers.{phase}: ")]
    return note.split(": ")[1].split(",")[0]


def crossover(outcome: Outcome, phase: str) -> int | None:
    (note,) = [n for n in outcome.notes if n.startswith(f"@moe_layers.{phase}: ")]
    found = re.search(r"crossover at context (\d+)", note)
    return int(found[1]) if found else None


def test_decode_is_absorbed_and_a_prompt_is_not(deepseek: Module) -> None:
    outcome = decide(deepseek, targets.load("h800"), Limits(128, 4096, 4096))
    assert (form(outcome, "prefill"), form(outcome, "decode")) == ("plain", "absorbed")


def test_a_crossover_separates_the_forms(deepseek: Module) -> None:
    """At one sequence plain decode wins at short contexts; at the context that is printed the answer flips."""
    target = targets.load("h800")
    short = decide(deepseek, target, Limits(1, 128, 4096))
    assert form(short, "decode") == "plain"
    at = crossover(short, "decode")
    assert at is not None
    assert form(decide(deepseek, target, Limits(1, at - 1, 4096)), "decode") == "plain"
    assert form(decide(deepseek, target, Limits(1, at, 4096)), "decode") == "absorbed"


def test_less_bandwidth_favours_absorption(deepseek: Module) -> None:
    """The plain form writes and reads the expanded keys: with a tenth of the bandwidth its crossover comes sooner."""
    target = targets.load("h800")
    slow = replace(target, device=replace(target.device, memory_bandwidth=target.device.memory_bandwidth / 10))
    limits = Limits(1, 8192, 256)
    before, after = (crossover(decide(deepseek, t, limits), "prefill") for t in (target, slow))
    assert after is not None and (before is None or after <= before)
    assert form(decide(deepseek, slow, limits), "prefill") == "absorbed"


def test_several_query_tokens_share_the_expansion(deepseek: Module) -> None:
    target, limits = targets.load("h800"), Limits(16, 4096, 4096)
    one, four = (decide(deepseek, target, limits, queries=n) for n in (1, 4))
    assert form(four, "decode") == "absorbed"
    assert any("(4 tokens of 16 sequences" in n for n in four.notes)
    assert one.notes != four.notes
    with pytest.raises(PassError, match=r"queries must lie in 0\.\.64"):
        decide(deepseek, target, limits, queries=65)


def test_folding_would_add_25_billion_parameters(deepseek: Module) -> None:
    """61 layers of 128·(1536·512 - 128·(1536 + 512)) and 128·(512·7168 - 128·(512 + 7168))."""
    outcome = decide(deepseek, targets.load("h800"), Limits(128, 4096, 4096))
    (line,) = [d for d in outcome.details if d.startswith("@moe_layers.decode: folding")]
    extra = 128 * (1536 * 512 - 128 * (1536 + 512)) + 128 * (512 * 7168 - 128 * (512 + 7168))
    assert f"folding over 61 layers: {61 * extra / 1e9:.2f} G parameters more" in line
    assert 61 * extra / 1e9 == pytest.approx(25.07, abs=0.01)
    assert line.count("not folded") == 2


RANK_32 = {"kv_lora_rank": "32", "num_hidden_layers": "2", "first_k_dense_replace": "1"}


def test_small_ranks_are_folded_and_the_values_stay() -> None:
    """A latent of 32 beside heads of 32: the folded product is smaller than the two, and one launch instead of two.

    `verify` evaluates the module before and after in float64: the pass promises 1e-5.
    """
    traced = moec.trace("tiny-deepseek-v3", RANK_32)
    spec = "mla-absorb{decode=absorbed}"
    plan = traced.optimize("h800", context=64, chunk=16, batch=2, recipe="bf16", passes=[spec], verify="numerics")
    (record,) = [r for r in plan.records if r.name == "mla-absorb"]
    folded = [n for n in record.notes if n.startswith("@moe_layers.decode: folded")]
    assert len(folded) == 2 and all("M parameters a layer" in n for n in folded)
    decode = plan.ir.functions["moe_layers.decode"].ops
    assert not any(op.name == "linear.heads" for op in decode)
    assert any(op.name == "attn.mla_absorbed" for op in decode)


@pytest.mark.parametrize("fold,heads", [("never", 2), ("always", 0), ("auto", 2)])
def test_folding_by_option(fold: str, heads: int) -> None:
    """A rank of 128 is not folded by itself: the product would be larger than its parts."""
    spec = f"mla-absorb{{decode=absorbed,fold={fold}}}"
    plan = moec.trace("tiny-deepseek-v3").optimize("h800", recipe="bf16", passes=[spec])
    decode = plan.ir.functions["moe_layers.decode"].ops
    assert sum(op.name == "linear.heads" for op in decode) == heads
    with pytest.raises(PassError, match="fold must be one of auto, never, always, got 'perhaps'"):
        MlaAbsorb(fold="perhaps").run(moec.trace("tiny-deepseek-v3").ir, Context(targets.load("h800"), Limits()))


def test_one_copy_of_the_up_projection(deepseek: Module) -> None:
    """Plain prefill and absorbed decode read one matrix on a GPU; a CPU's layout keeps slices of its own."""
    plan = moec.trace("deepseek-v3").optimize("h800")
    names = {n.rsplit(".", 2)[-2] + "." + n.rsplit(".", 2)[-1] for n in plan.ir.weights if "kv_b" in n}
    assert names == {"attn.kv_b"}
    decode = plan.ir.functions["moe_layers.decode"].ops
    parts = [(op.attrs["part"], op.attrs.get("transposed", False)) for op in decode if op.name == "linear.heads"]
    assert parts == [((0, 128, 256), True), ((128, 256, 256), False)]
    (record,) = [r for r in plan.records if r.name == "share-heads"]
    assert sum("MB less" in n for n in record.notes) == 4


def test_slices_stay_where_nothing_is_read_whole(deepseek: Module) -> None:
    plan = moec.trace("deepseek-v3").optimize("h800", phase="decode")
    (record,) = [r for r in plan.records if r.name == "share-heads"]
    assert [n for n in record.notes if "kv_b.v: nothing else reads what they are slices of" in n]
    outcome = ShareHeads().run(clone_module(deepseek), Context(targets.load("cpu"), Limits()))
    assert outcome.warnings == ["kernels of cpu read slices by head in a layout of their own"]


def test_blocks_that_cut_heads_keep_two_copies() -> None:
    plan = moec.trace("tiny-deepseek-v3").optimize("h800")
    (record,) = [r for r in plan.records if r.name == "share-heads"]
    assert any("a head's rows 0..32 of 64 do not follow blocks of 128" in n for n in record.notes)
    assert any(n.endswith("kv_b.k") for n in plan.ir.weights)


def test_sharing_changes_no_value() -> None:
    """Evaluated before and after in float64 with tolerance 0, in BF16 and in FP8 whose blocks follow the heads."""
    settings = {"num_hidden_layers": "2", "first_k_dense_replace": "1", "qk_nope_head_dim": "128", "v_head_dim": "128"}
    spec = "mla-absorb{prefill=plain,decode=absorbed,fold=never}"
    for recipe in ("bf16", "deepseek-v3"):
        plan = moec.trace("tiny-deepseek-v3", settings).optimize(
            "h800", context=64, chunk=16, batch=2, recipe=recipe, passes=[spec], verify="numerics"
        )
        assert any(op.attrs.get("transposed") for _, op in plan.ir.ops() if op.name == "linear.heads")


def test_the_report_has_expressions_and_plots(deepseek: Module) -> None:
    outcome = decide(deepseek, targets.load("h800"), Limits(128, 4096, 4096))
    (line,) = [d for d in outcome.details if d.startswith("@moe_layers.decode: plain")]
    # 2·S·512·32768 to expand, 2·T·S·128·320 to attend; 2·T·C·128·(2·512 + 64) absorbed.
    assert "S*33554432 + S*T*81920 operations" in line and "C*T*278528" in line
    assert len(outcome.figures) == 4 and all(f.startswith("<svg") and "</svg>" in f for f in outcome.figures)


@pytest.mark.parametrize("prefill,fold", [("plain", "never"), ("absorbed", "never"), ("absorbed", "always")])
def test_both_forms_equal_transformers(prefill: str, fold: str, tmp_path: Path) -> None:
    """Prefill, chunks over a cached prefix (several tokens at once), and decode, in FP32."""
    oracle = save_model("v3", tmp_path / "hf", seed=3)
    spec = f"mla-absorb{{prefill={prefill},decode=absorbed,fold={fold}}}"
    plan = moec.trace(str(tmp_path / "hf")).optimize("cpu", context=96, chunk=32, recipe="fp32", passes=[spec])
    model = moec.load(plan.compile(tmp_path / "m.moec").path)
    ids = np.random.default_rng(2).integers(0, 211, (1, 40))
    with torch.no_grad():
        expected = oracle(torch.tensor(ids)).logits.numpy()
    for chunk in (None, 7, 2, 1):
        got = model.logits(ids, chunk=chunk)
        assert np.abs(got - expected).max() / expected.std() < 1e-4, f"chunk={chunk}"
