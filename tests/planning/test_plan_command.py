"""`moec plan`: the form of its answers, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moec.cli.plan import register
from moec.errors import InputError


def run(*words: str) -> str:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def answer(*words: str) -> dict[str, Any]:
    found = json.loads(run(*words, "--json"))
    assert isinstance(found, dict)
    return found


def test_json_is_one_object_with_the_documented_fields() -> None:
    found = answer("deepseek-v3", "--target", "h800-ep144")
    assert found["forms"] == {"prefill": "plain", "decode": "absorbed"}
    assert set(found["crossover_context"]) == {"prefill", "decode"}
    assert found["layout"]["redundant_experts"] == 32
    assert found["memory_bytes"]["total"] == pytest.approx(
        sum(found["memory_bytes"][part] for part in ("weights", "kv_cache", "activations", "buffers"))
    )
    for phase in ("prefill", "decode"):
        assert sum(op["share"] for op in found["ops"][phase]) == pytest.approx(1.0)
        assert sum(op["time_us"] for op in found["ops"][phase]) == pytest.approx(
            found["phases"][phase]["serial_ms"] * 1e3
        )
        assert found["tokens_per_s"][phase]["node"] == pytest.approx(8 * found["tokens_per_s"][phase]["device"])
    assert found["time_per_token_ms"] == found["phases"]["decode"]["step_ms"]
    assert found["bound"]["decode"] in ("compute", "memory", "network", "latency")
    assert found["fits"]


def test_targets_are_compared_and_a_number_is_changed() -> None:
    compared = answer("deepseek-v2-lite", "--target", "h800,h20", "--what-if", "memory_bandwidth=0.1x")
    assert [p["target"] for p in compared["plans"]] == ["h800", "h20"]
    for plan in compared["plans"]:
        assert plan["what_if"]["change"] == "memory_bandwidth=0.1x"
        assert plan["what_if"]["time_per_token_ms"] > plan["time_per_token_ms"]


def test_the_table_names_what_was_asked() -> None:
    text = run("deepseek-v3", "--target", "h800-ep32", "--redundant", "32")
    for part in ("9 of 288 experts", "first token after", "attention absorbed", "crossover at context", "bound by"):
        assert part in text
    assert "h20" in run("deepseek-v2-lite", "--target", "h800,h20")


def test_a_model_without_latents_has_one_form() -> None:
    words = ("qwen3-30b-a3b", "--target", "h800")
    assert "attention caches keys and values per head" in run(*words)
    found = answer(*words)
    assert {form for times in found["form_times_us"].values() for form in times} == {"plain"}
    assert found["crossover_context"] == {"prefill": None, "decode": None}
    rows = [line.split() for line in run(*words, "--batch", "1,2").splitlines() if line.strip()[:1].isdigit()]
    assert rows and all(row[-2:] == ["-", "none"] for row in rows)


def test_a_model_that_does_not_fit_is_planned_with_a_warning() -> None:
    found = answer("deepseek-v3", "--target", "h800", "--batch", "1")
    assert not found["fits"]
    assert "GB too much; the weights fit on 16 ranks" in found["warnings"][0]


def test_own_target_files_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "slow.yaml"
    file.write_text(
        "name: slow\nextends: h800\ndevice:\n  memory:\n"
        "    bandwidth: {value: 335 GB/s, source: a tenth of the data sheet}\n"
    )
    found = answer("deepseek-v2-lite", "--target", f"h800,{file}", "--set", "num_hidden_layers=4")
    fast, slow = found["plans"]
    assert slow["time_per_token_ms"] > 2 * fast["time_per_token_ms"]
    assert max(op["calls"] for op in fast["ops"]["decode"]) == 3


def test_lists_give_the_form_at_each_batch_and_context(tmp_path: Path) -> None:
    """One sequence expands keys at short contexts only; the crossover between is the plan's own."""
    words = ("deepseek-v3", "--target", "h800", "--batch", "1,64", "--context", "128,4096")
    points = answer(*words)["sweep"]
    assert [(p["batch"], p["context"]) for p in points] == [(1, 128), (1, 4096), (64, 128), (64, 4096)]
    at = points[0]["crossover_context"]["decode"]
    assert 128 < at < 4096
    assert [p["forms"]["decode"] for p in points] == ["plain", *["absorbed"] * 3]
    assert {p["forms"]["prefill"] for p in points} == {"plain"}
    for point in points:
        for phase, times in point["form_times_us"].items():
            assert point["forms"][phase] == min(times, key=lambda form: times[form])
    one = answer("deepseek-v3", "--target", "h800", "--batch", "1", "--context", "4096", "--prompt", "4096")
    assert points[1] == {**{k: one[k] for k in points[1] if k in one}, "batch": 1, "context": 4096}
    text = run(*words, "--what-if", "memory_bandwidth=0.1x")
    assert text.count("milliseconds of a step") == 2 and text.count(" 4096 ") == 6


MISTAKES = [
    (["--batch", "1,many"], "--batch wants a whole number, or some separated by commas, got '1,many'"),
    (["--context", "128,128"], "--context names a number twice: 128,128"),
    (["--batch", "1,2", "--search"], "compare attention's forms: leave --search away"),
    (["--batch", "1,0"], "batch must lie in"),
    (["--context", "4096,200000"], "exceeds the model's 163840 positions"),
    (["--what-if", "nvlnk=2x"], "did you mean nvlink"),
    (["--what-if", "nvlink"], "write KEY=VALUE"),
    (["--what-if", "nvlink=fast"], "not a number with a unit"),
    (["--what-if", "nvlink=twox"], "no factor"),
    (["--what-if", "nvlink=400"], "has no unit"),
    (["--what-if", "nvlink=-2x"], "must be positive"),
    (["--what-if", "nvlink=nanx"], "must be positive"),
    (["--what-if", "matrix_rate=2 TFLOPS"], "takes a factor"),
    (["--ranks", "30"], "multiple of 8"),
    (["--ranks", "0"], "ranks must lie in"),
    (["--ranks", "32", "--tp", "3"], "do not divide by TP 3; try TP 2"),
    (["--ranks", "32", "--tp", "4", "--dp", "4"], "makes 16 ranks, not 32"),
    (["--ranks", "32", "--ep", "5"], "do not divide by EP 5; try EP 4"),
    (["--ranks", "144", "--redundant", "0"], "--redundant 32 (288 slots, 2 a device)"),
    (["--ranks", "32", "--redundant", "33"], "--redundant 64 (320 slots, 10 a device)"),
    (["--redundant", "-1"], "redundant experts must lie in"),
    (["--ranks", "32", "--tp", "32"], "TP 32 cuts @dense_layers.mlp.gate_up: 18432 over 32 devices is 576"),
    (["--ranks", "16", "--tp", "16"], "exceeds the 8 devices"),
    (["--batch", "0"], "batch must lie in"),
    (["--context", "200000"], "exceeds the model's 163840 positions"),
    (["--balance", "1.5"], "at most 1"),
    (["--overlap", "maybe"], "one of auto, on, off"),
    (["--recipe", "fp9"], "unknown recipe 'fp9'"),
    (["--target", "h800,h800"], "twice"),
    (["--target", "h801"], "unknown target"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_get_one_line_that_helps(words: list[str], message: str) -> None:
    target = [] if "--target" in words else ["--target", "h800"]
    with pytest.raises(InputError) as caught:
        run("deepseek-v3", *target, *words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_width_that_is_no_multiple_of_the_block_is_not_cut() -> None:
    with pytest.raises(InputError, match=r"10944 over 2 devices is 5472, not a multiple of its 128-wide.*pad .* 11008"):
        run("deepseek-v2-lite", "--target", "h800", "--tp", "2")
    assert answer("deepseek-v2-lite", "--target", "h800", "--tp", "2", "--recipe", "bf16")["layout"]["tp"] == 2


def test_a_target_without_links_cannot_have_ranks() -> None:
    with pytest.raises(InputError):
        run("deepseek-v2-lite", "--target", "cpu", "--ranks", "2")
