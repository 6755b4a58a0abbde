"""The embedded model, compiled and run, against the same weights in transformers."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moec
from moec.cli import main
from moec.runtime import Model
from moec.runtime.errors import WrongHash
from moec.runtime.perplexity import score_text

FOLDER = Path(moec.__file__).resolve().parents[2] / "model_defs" / "presets_data" / "tiny-deepseek-v3"
PROMPT = 'def walk(top, topdown=True):\n    """Directory tree generator.\n'
CONTEXT = 192


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "tiny.moec"
    moec.trace(str(FOLDER)).optimize("cpu", batch=2, context=CONTEXT, chunk=48, recipe="fp32").compile(out)
    return out


@pytest.fixture(scope="module")
def model(artifact: Path) -> Model:
    return moec.load(artifact, check=True)


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def heldout(model: Model) -> list[int]:
    return model.tokenizer.encode((FOLDER / "heldout.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize("chunk", [None, 1, 7, 20])
def test_logits_equal_those_of_transformers(
    model: Model, reference: Any, heldout: list[int], chunk: int | None
) -> None:
    ids = np.array([heldout[:150], heldout[300:450], np.random.default_rng(0).integers(0, model.vocab, 150)])
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(model.logits(ids, chunk=chunk) - expected).max() < 1e-4 * expected.std()


def generated(reference: Any, ids: list[int], new: int) -> list[int]:
    with torch.no_grad():
        out = reference.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)
    return out[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def test_generation_equals_that_of_transformers(model: Model, reference: Any, heldout: list[int]) -> None:
    ids = model.tokenizer.encode(PROMPT)
    assert ids == AutoTokenizer.from_pretrained(FOLDER)(PROMPT)["input_ids"]
    assert model.generate(ids, 128) == generated(reference, ids, 128)
    prompts = [ids[:9], heldout[40:103], heldout[200:264], heldout[7:8], heldout[500:565]]
    assert model.generate(prompts, 24) == [generated(reference, one, 24) for one in prompts]


def test_perplexity_equals_that_of_transformers(model: Model, reference: Any) -> None:
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")[:1500]
    ids = torch.tensor([model.tokenizer.encode(text)])
    window, stride, scored, total = CONTEXT, CONTEXT // 2, 1, 0.0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        with torch.no_grad():
            logits = reference(ids[:, begin:end]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits.double(), ids[0, begin + 1 : end], reduction="none")
        total += float(losses[scored - begin - 1 :].sum())
        scored = end
        if end == ids.shape[1]:
            break
    assert score_text(model, text).perplexity == pytest.approx(math.exp(total / (ids.shape[1] - 1)), rel=1e-4)


@pytest.mark.parametrize("name", ["kernels/kernels.so", "kernels/kernels.json", "program.ir", "plan.json"])
def test_a_flipped_byte_of_what_the_compiler_wrote_is_found(artifact: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy.moec"
    for file in artifact.rglob("*"):
        target = copy / file.relative_to(artifact)
        if file.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    raw = bytearray((artifact / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / name).unlink()
    (copy / name).write_bytes(raw)
    with pytest.raises(WrongHash, match=name):
        moec.load(copy)


def test_a_profile_accounts_for_the_whole_step(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace.json"
    options = ["--profile", "--prompt-tokens", "40", "--trace", str(trace), "--json"]
    monkeypatch.setattr(sys, "argv", ["moec", "bench", str(artifact), *options])
    with pytest.raises(SystemExit, match="0"):
        main()
    decode, prefill = json.loads(capsys.readouterr().out)
    assert (decode["phase"], prefill["phase"], prefill["tokens"]) == ("decode", "prefill", 40)
    seen = set()
    for phase in (decode, prefill):
        names = {op["name"] for op in phase["ops"]}
        seen |= names
        assert {"moe.experts", "moe.route", "linear", "embed"} <= names
        assert all(op["us"] >= 0 and op["bound_us"] >= 0 for op in phase["ops"])
        predicted = {op["name"] for op in phase["ops"] if op["predicted_us"] is not None}
        # The cost model has no FP32 weights.
        assert {"norm.rms", "swiglu"} <= predicted and not {"moe.experts", "linear"} & predicted
        # Ticks cover the call but for the work around it.
        assert 0.2 * phase["step_us"] < sum(op["us"] for op in phase["ops"]) < 1.5 * phase["step_us"]
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert {e["name"] for e in events} == seen


def test_measured_rows_calibrate_the_target(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that `moec bench` measures are what `moec targets calibrate` reads: attention in both forms, at several
    contexts, each op with its own sizes."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["moec", *words])
        with pytest.raises(SystemExit, match="0"):
            main()
        return capsys.readouterr().out

    rows, out = tmp_path / "rows.jsonl", tmp_path / "calibrated.yaml"
    run("bench", str(artifact), "--calibration-rows", str(rows))
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    decode = [row for row in found if row["op"] == "mla_decode"]
    prefill = [row for row in found if row["op"] == "mla_prefill"]
    assert {(row["heads"], row["kv_rank"], row["rope"]) for row in decode} == {(4, 128, 16)}
    assert len({row["context"] for row in decode}) == 5
    assert {(row["form"], row["nope"], row["v_head"]) for row in prefill} == {("plain", 32, 32)}
    report = json.loads(run("targets", "calibrate", "cpu", "--rows", str(rows), "--out", str(out), "--json"))
    assert {"mla_decode bf16", "mla_prefill", "stream"} <= set(report["families"])
    assert "fitted to rows.jsonl" in out.read_text()
    run("targets", "check", str(out))
