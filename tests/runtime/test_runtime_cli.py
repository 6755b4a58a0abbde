"""`moec run`, `bench`, `eval` and `doctor` on the toy artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from toy_artifact import CONTEXT, EOS, VOCAB
from typer.testing import CliRunner, Result

from moec.cli import bench, doctor, info, run
from moec.cli import eval as evaluation
from moec.errors import InputError, MoecError
from moec.runtime import load

COMMANDS = ("run", "bench", "eval", "doctor")


def invoke(*args: str) -> Result:
    app = typer.Typer()
    for command in (run, bench, evaluation, doctor):
        command.register(app)
    return CliRunner().invoke(app, list(args))


def works(*args: str) -> Result:
    result = invoke(*args)
    assert result.exit_code == 0, result.exception
    return result


def as_json(*args: str) -> dict[str, Any]:
    return dict(json.loads(works(*args, "--json").stdout))


def test_run_prints_the_text_and_nothing_else_on_stdout(toy: Path) -> None:
    model = load(toy)
    ids = model.tokenizer.encode("hello")
    new = model.generate(ids, 20)
    result = works("run", str(toy), "--prompt", "hello", "--max-new-tokens", "20")
    assert result.stdout == model.tokenizer.decode(new) + "\n"  # type: ignore[arg-type]
    assert "5 prompt tokens" in result.stderr


def test_run_json_has_the_agreed_fields(toy: Path) -> None:
    fields = as_json("run", str(toy), "--prompt-ids", "1,2, 3", "--max-new-tokens", "6")
    model = load(toy)
    assert fields["token_ids"] == model.generate([1, 2, 3], 6)
    assert fields["text"] == model.tokenizer.decode(fields["token_ids"])
    assert fields["prefill_tokens_per_s"] > 0 and fields["decode_tokens_per_s"] > 0
    assert (fields["artifact"], fields["target"]) == (str(toy), "cpu")


def test_run_samples_by_seed(toy: Path) -> None:
    options = ["run", str(toy), "--chat", "hi", "--temperature", "1", "--top-p", "0.9", "--max-new-tokens", "12"]
    first, again = as_json(*options, "--seed", "3"), as_json(*options, "--seed", "3")
    assert first["token_ids"] == again["token_ids"] != as_json(*options, "--seed", "4")["token_ids"]
    model = load(toy)
    expected = model.generate(model.tokenizer.encode_chat("hi"), 12, temperature=1, top_p=0.9, seed=3)
    assert first["token_ids"] == expected


def test_run_takes_what_fits_when_no_number_is_given(toy: Path) -> None:
    ids = ",".join(["5"] * (CONTEXT - 10))
    tokens = as_json("run", str(toy), "--prompt-ids", ids)["token_ids"]
    assert len(tokens) == 11 or tokens[-1] == EOS


def test_an_artifact_without_tokenizer_runs_on_ids(toy: Path, copy: Any) -> None:
    import shutil

    import toy_artifact

    path = copy()
    shutil.rmtree(path / "tokenizer")
    toy_artifact.seal(path)
    shown = works("run", str(path), "--prompt-ids", "1,2", "--max-new-tokens", "4").stdout
    assert [int(token) for token in shown.split()] == load(toy).generate([1, 2], 4)
    assert as_json("run", str(path), "--prompt-ids", "1,2", "--max-new-tokens", "4")["text"] is None
    result = invoke("run", str(path), "--prompt", "a")
    assert "--prompt-ids" in str(result.exception)


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ([], "exactly one of"),
        (["--prompt", "a", "--prompt-ids", "1"], "exactly one of"),
        (["--prompt-ids", "1,x"], "'1,x'"),
        (["--prompt-ids", ""], "empty"),
        (["--prompt", ""], "empty"),
        (["--prompt-ids", f"1,{VOCAB}"], "outside the vocabulary"),
        (["--prompt-ids", "-1"], "outside the vocabulary"),
        (["--prompt", "x" * (CONTEXT + 1)], f"{CONTEXT + 1} tokens, the artifact was compiled for {CONTEXT}"),
        (["--prompt-ids", "1", "--max-new-tokens", str(CONTEXT + 1)], "exceed the compiled context"),
        (["--prompt-ids", "1", "--max-new-tokens", "0"], "max-new-tokens"),
        (["--prompt-ids", "1", "--temperature", "-1"], "temperature"),
        (["--prompt-ids", "1", "--top-p", "2"], "top-p"),
        (["--prompt-ids", "1", "--seed", "-2"], "seed"),
        (["--prompt-ids", "1", "--threads", "0"], "threads"),
    ],
)
def test_run_refuses_in_one_line(toy: Path, args: list[str], names: str) -> None:
    result = invoke("run", str(toy), *args)
    assert isinstance(result.exception, InputError)
    assert names in str(result.exception) and "\n" not in str(result.exception)
    assert not result.stdout


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--profile", "--prompt-tokens", "0"], f"prompt-tokens must be 1 to {CONTEXT - 1}, as compiled, is 0"),
        (["--profile", "--prompt-tokens", str(CONTEXT)], f"prompt-tokens must be 1 to {CONTEXT - 1}"),
        (["--profile", "--repeat", "0"], "repeat must be at least 1, is 0"),
        (["--profile", "--batch", "2"], "--profile is a measurement of its own: leave --batch away"),
        (["--calibration-rows", "x", "--profile", "--new-tokens", "3"], "leave --new-tokens and --profile away"),
        (["--speculate", "1", "--trace", "x"], "--speculate is a measurement of its own: leave --trace away"),
        (["--trace", "x"], "give --profile or use torchrun"),
    ],
)
def test_bench_refuses_in_one_line(toy: Path, args: list[str], names: str) -> None:
    result = invoke("bench", str(toy), *args)
    assert isinstance(result.exception, InputError)
    assert names in str(result.exception) and "\n" not in str(result.exception)


def test_weights_are_checked_when_asked(copy: Any) -> None:
    path = copy()
    file = path / "weights" / "rank-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    works("run", str(path), "--prompt-ids", "1", "--max-new-tokens", "1")
    result = invoke("run", str(path), "--prompt-ids", "1", "--check")
    assert "rank-00000" in str(result.exception)


@pytest.mark.parametrize("command", COMMANDS[:3])
def test_a_path_that_is_no_artifact(tmp_path: Path, command: str) -> None:
    text = tmp_path / "text"
    text.write_text("abc")
    more = {"run": ["--prompt", "a"], "bench": [], "eval": ["--text", str(text)]}[command]
    result = invoke(command, str(tmp_path), *more)
    assert isinstance(result.exception, MoecError)
    assert "is not an artifact" in str(result.exception)


def test_bench_shows_rates_and_bound(toy: Path) -> None:
    fields = as_json("bench", str(toy), "--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "1")
    assert fields["prefill_tokens_per_s"] > 0 and fields["decode_tokens_per_s"] > 0 and fields["read_bandwidth"] > 0
    result = works("bench", str(toy), "--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "1")
    rows = {line[:13].strip(): line[13:] for line in result.stdout.splitlines()}
    assert list(rows) == ["model", "prefill", "decode", "decode bound", "load", "peak memory"]
    assert "toy, fp32, target cpu" in rows["model"]


def test_eval_shows_perplexity_and_windows(toy: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"some text\r\nfor the toy")
    fields = as_json("eval", str(toy), "--text", str(file), "--stride", "7")
    assert (fields["tokens"], fields["bytes"], fields["window"], fields["stride"]) == (21, 21, CONTEXT, 7)
    shown = works("eval", str(toy), "--text", str(file)).stdout
    assert f"perplexity {fields['perplexity']:.4f}" in shown
    assert f"windows of {CONTEXT} tokens, stride {CONTEXT // 2}" in shown


def test_eval_refuses_what_is_no_text(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    for name, why in (("bytes", "UTF-8 text (byte 2)"), ("nowhere", "No such file"), (".", "directory")):
        result = invoke("eval", str(toy), "--text", str(tmp_path / name))
        assert isinstance(result.exception, InputError)
        assert why in str(result.exception)


def test_doctor_says_what_to_do_about_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    version = metadata.version

    def without_triton(name: str) -> str:
        if name == "triton":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_triton)
    lines = {line["name"]: line for line in as_json("doctor")["lines"]}
    assert not lines["triton"]["ok"] and "pip install" in lines["triton"]["advice"]
    assert lines["numpy"]["found"].startswith(version("numpy"))
    assert {"python", "CPU features", "threads", "huge pages", "TVM runtime", "C++ compiler"} <= set(lines)
    shown = works("doctor").stdout.splitlines()
    assert any(line.startswith("warn  triton") and "->" in line for line in shown)


def test_running_an_artifact_needs_neither_compiler_nor_torch(toy: Path) -> None:
    code = f"""
import sys
from moec.runtime import load
model = load({str(toy)!r})
model.generate([1, 2, 3], 4)
model.tokenizer.decode([1])
used = [n for n in ("torch", "tvm", "transformers", "moec.codegen", "moec.passes", "moec.frontend") if n in sys.modules]
assert not used, used
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_run_reads_standard_input(toy: Path) -> None:
    app = typer.Typer()
    for command in (run, bench):
        command.register(app)
    asked = ["run", str(toy), "--max-new-tokens", "5", "--json"]
    piped = CliRunner().invoke(app, [*asked, "--prompt", "-"], input="hellö\n")
    assert json.loads(piped.stdout)["token_ids"] == as_json(*asked[:-1], "--prompt", "hellö")["token_ids"]
    assert json.loads(piped.stdout)["prompt_tokens"] == 6


def test_run_ends_before_a_stop_text(toy: Path) -> None:
    asked = ["run", str(toy), "--prompt", "hello", "--max-new-tokens", "40"]
    whole = as_json(*asked)
    stop = whole["text"][5:7]
    cut = as_json(*asked, "--stop", "never said", "--stop", stop)
    assert cut["text"] == whole["text"][: whole["text"].index(stop)] and cut["finish_reason"] == "stop"
    assert cut["token_ids"] == whole["token_ids"][: len(cut["token_ids"])]
    assert works(*asked, "--stop", stop).stdout == cut["text"] + "\n"
    assert isinstance(invoke(*asked, "--stop", "").exception, InputError)


def test_run_goes_on_behind_the_end(toy: Path) -> None:
    fields = as_json("run", str(toy), "--prompt", "hello", "--max-new-tokens", "60", "--ignore-eos")
    assert len(fields["token_ids"]) == 60 and fields["finish_reason"] == "length"


def test_run_answers_many_prompts_in_their_order(toy: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"hello"\n\n{"prompt_ids": [1, 2, 3]}\n{"chat": "hi"}\n{"prompt": "x"}\n"' + "y" * 60 + '"\n')
    model = load(toy)
    ids = [model.tokenizer.encode(t) for t in ("hello", "x", "y" * 60)]
    asked = [ids[0], [1, 2, 3], model.tokenizer.encode_chat("hi"), *ids[1:]]
    done = works("run", str(toy), "--prompts", str(file), "--max-new-tokens", "9", "--temperature", "1", "--seed", "3")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["token_ids"] for r in rows] == model.generate(asked, 9, temperature=1, seed=3)
    assert [r["text"] for r in rows] == [model.tokenizer.decode(r["token_ids"]) for r in rows]
    assert [r["prompt_tokens"] for r in rows] == [len(a) for a in asked]
    assert {tuple(r) for r in rows} == {("token_ids", "text", "prompt_tokens", "finish_reason")}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no prompt"),
        ("\n \n", "holds no prompt"),
        ("hello", ":1: must be a JSON string"),
        ('"a"\n{"prompt": 5}', ":2: must be a JSON string"),
        ('{"prompt": "a", "chat": "b"}', ":1: must be a JSON string"),
        ('{"prompt_ids": [true]}', ":1: must be a JSON string"),
        ('{"prompt_ids": []}', ":1: the prompt has 0 tokens"),
        ('{"prompt_ids": [1, 300]}', ":1: token id 300 is not in 0 to 299"),
        ('"' + "x" * 201 + '"', ":1: the prompt has 201 tokens, the artifact takes 1 to 200"),
        ("[" * 100000, ":1: must be a JSON string"),
        ("\udcff", "is not UTF-8 text (byte 0)"),
    ],
    ids=lambda t: t[:30].encode("unicode_escape").decode(),
)
def test_wrong_files_of_prompts(toy: Path, tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(text.encode(errors="surrogateescape"))
    error = invoke("run", str(toy), "--prompts", str(file)).exception
    assert isinstance(error, InputError) and says in str(error) and str(file) in str(error)


def test_info_says_what_an_artifact_is(toy: Path, copy: Any) -> None:
    app = typer.Typer()
    for command in (info, run):
        command.register(app)
    fields = json.loads(CliRunner().invoke(app, ["info", str(toy), "--json"]).stdout)
    assert (fields["model"], fields["target"], fields["kind"]) == ("toy", "cpu", "cpu")
    assert (fields["vocab"], fields["context"], fields["ranks"]) == (VOCAB, CONTEXT, 1)
    assert fields["tokenizer"] and fields["chat_template"] and fields["runs_here"] and fields["why_not"] is None
    whole = {f.relative_to(toy): f.stat().st_size for f in toy.rglob("*") if f.is_file() and f.name != "manifest.json"}
    assert sum(fields["bytes"].values()) == sum(whole.values())
    path = copy()
    weights = next((path / "weights").iterdir())
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "runs here     no: " in (text := CliRunner().invoke(app, ["info", str(path)]).stdout) and "truncated" in text
    (path / "program.ir").write_text("module @other {\n}\n")
    shown = CliRunner().invoke(app, ["info", str(path)])
    assert shown.exit_code == 0
    assert "runs here     no: " in shown.stdout and "program.ir was changed after compiling" in shown.stdout
    assert isinstance(CliRunner().invoke(app, ["info", str(toy / "nope")]).exception, InputError)
