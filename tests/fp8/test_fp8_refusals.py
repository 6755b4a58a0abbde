"""What is refused at plan time: one line with the sizes and a way out, exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moec.cli import main

CASES = {
    "a block cut by tensor parallelism": (
        ["deepseek-v3", "--target", "gb200-nvl72", "--tp", "16", "--ranks", "64", "--set", "intermediate_size=3072"],
        "TP 16 cuts @dense_layers.mlp.gate_up: 3072 over 16 devices is 192, not a multiple of its 128-wide scale "
        "block; use TP 8, ",
    ),
    "odd rotary dims": (
        ["deepseek-v3", "--target", "h800", "--set", "qk_rope_head_dim=63"],
        "qk_rope_head_dim must be even (rotary pairs), got 63; 62 or 64 would be",
    ),
    "a latent without whole blocks": (
        ["deepseek-v3", "--target", "h800", "--set", "kv_lora_rank=500", "--pass", "fp8-cast{cache=fp8}"],
        "kv_lora_rank 500 is no multiple (512 would be); keep the cache in bf16",
    ),
    "an unknown recipe": (
        ["deepseek-v3", "--target", "h800", "--recipe", "deepseek-v33"],
        "recipe 'deepseek-v33' is not known (did you mean deepseek-v3?)",
    ),
    "an unknown type": (
        ["deepseek-v3", "--target", "h800", "--recipe", "{tmp}/type.yaml"],
        "rules[0].weight: unknown type fp7",
    ),
    "an unknown use": (
        ["deepseek-v3", "--target", "h800", "--recipe", "{tmp}/use.yaml"],
        "rules[0]: no use of a weight is called linaer (did you mean linear",
    ),
    "blocks for a vector": (
        ["deepseek-v3", "--target", "h800", "--recipe", "{tmp}/all.yaml"],
        "a vector of 7168, blocks of 128x128: let a rule before it decide, such as {op: norm.rms, weight: bf16}",
    ),
    "a misspelt field": (
        ["deepseek-v3", "--target", "h800", "--recipe", "{tmp}/field.yaml"],
        "rules[0]: unknown field weigth (did you mean weight?)",
    ),
    "a folding that is none": (
        ["tiny-deepseek-v3", "--pass", "mla-absorb{fold=perhaps}"],
        "fold must be one of auto, never, always, got 'perhaps'",
    ),
    "no weight": (
        ["deepseek-v3", "--target", "h800", "--recipe", "{tmp}/none.yaml"],
        "recipe none names no weight of ",
    ),
    "an unknown cache": (
        ["deepseek-v3", "--target", "h800", "--pass", "fp8-cast{cache=fp9}"],
        "unknown cache 'fp9' (did you mean fp8?)",
    ),
    "a combine without kernels": (
        ["tiny-deepseek-v3", "--pass", "fp8-cast{combine=logfmt10}"],
        "no CPU kernel sends logfmt10: use combine=bf16 or combine=fp8",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "type.yaml").write_text("rules: [{op: linear, weight: fp7}]")
    (tmp_path / "use.yaml").write_text("rules: [{op: linaer, weight: bf16}]")
    (tmp_path / "all.yaml").write_text("rules: [{op: '*', weight: 'fp8_e4m3 scale(f32, 128x128)'}]")
    (tmp_path / "field.yaml").write_text("rules: [{op: linear, weigth: bf16}]")
    (tmp_path / "none.yaml").write_text("rules: [{name: 'blocks.*', weight: bf16}]")
    arguments, message = CASES[case]
    given = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    monkeypatch.setattr("signal.signal", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["moec", "compile", *given, "--plan-only"])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1, err
    assert message in err
