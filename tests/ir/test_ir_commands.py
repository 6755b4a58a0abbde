"""`moec ir`: what each command prints, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from parser_texts import GOOD

import moec
from moec.cli import main
from moec.ir import print_module
from moec.ir.cost import amount
from moec.passes.op_times import op_times
from moec.passes.planning import LayoutRequest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.ir"
    path.write_text(GOOD)
    return path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    import sys
    from unittest.mock import patch

    with patch.object(sys, "argv", ["moec", *map(str, args)]), pytest.raises(SystemExit) as exit_:
        main()
    out = capsys.readouterr()
    return int(exit_.value.code or 0), out.out, out.err


def test_show_prints_the_module(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "ir", "show", file, "--locations") == (0, GOOD, "")


def test_show_filters_by_op_and_layer(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "ir", "show", file, "--op", "linear", "--layer", "3")
    assert (code, out) == (0, "@layer\n  %0 = linear %x, @w[%l] : bf16[T, 16]\n")


def test_show_cost(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chunk of 100 tokens times [8, 16]: 2·100·8·16 operations; 1.6 kB of x and 0.256 kB of weights."""
    _, out, _ = run(capsys, "ir", "show", file, "--op", "linear", "--cost", "--chunk", 100)
    assert out.endswith("// 25.6 kFLOP, 1.86 kB read, 3.2 kB written\n")


def test_show_cost_on_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run's time, how often a step runs it, what bounds it; the counts behind."""
    plan = moec.trace("deepseek-v3").optimize("h800", phase="decode", layout=LayoutRequest(ranks=64), batch=64)
    file = tmp_path / "m.ir"
    file.write_text(print_module(plan.ir))
    args = ("--function", "dense_layers.decode", "--op", "linear", "--cost", "--target", "h800", "--batch", 64)
    _, out, _ = run(capsys, "ir", "show", file, *args)
    lines = [line for line in out.splitlines() if "= linear %" in line]
    times = [
        t for t in op_times(plan.ir, plan.context) if t.function == "dense_layers.decode" and t.op.name == "linear"
    ]
    assert len(lines) == len(times) > 4
    for line, time in zip(lines, times, strict=True):
        assert time.cost is not None
        assert f"// {time.cost.time_us:.1f} us x 3, {time.cost.bound}; " in line
        assert f"{amount(time.cost.flops, 'FLOP')}, " in line, "of its micro-batch"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("show", "--target", "h800"), "--target says what --cost counts for: pass both"),
        (("show", "--op", "linear", "--batch", "3"), "--batch says what --cost counts for: pass both"),
        (("stats", "--points", "3"), "--points says what --quantisation measures: pass both"),
        (("opt", "--context", "3"), "--context is for passes: name one with --pass"),
        (("opt", "--tp", "2"), "--tp is for passes: name one with --pass"),
        (("opt", "--verify", "numerics"), "--verify is for passes: name one with --pass"),
        (("opt", "--strict"), "--strict is for passes: name one with --pass"),
    ],
)
def test_an_option_without_effect_is_refused(
    file: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    command, *options = args
    code, out, err = run(capsys, "ir", command, file, *options)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--function", "lay", "no function @lay (did you mean layer?)"),
        ("--op", "linaer", "no op linaer (did you mean linear?)"),
        ("--layer", "4", "no layer 4 (layers 0 to 3)"),
    ],
)
def test_a_filter_that_nothing_passes(
    file: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    code, out, err = run(capsys, "ir", "show", file, option, value)
    assert (code, out) == (2, "")
    assert message in err


def test_diff_has_exit_code_one(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.ir"
    other.write_text(GOOD.replace("add %x, %1", "add %1, %x"))
    assert run(capsys, "ir", "diff", file, file) == (0, "equal\n", "")
    assert run(capsys, "ir", "diff", file, other)[0] == 1
    _, out, _ = run(capsys, "ir", "diff", file, other, "--json")
    assert json.loads(out)["changes"][0]["where"] == "@layer"


def test_stats(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "ir", "stats", file, "--json")[1])
    assert found["parameters"] == 4 * 16 * 8
    assert found["weight_bytes"] == {"bf16": 4 * 16 * 8 * 2}
    assert found["functions"]["layer"] == {"linear": 1, "swiglu": 1, "add": 1}


def test_opt_gives_what_the_pipeline_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Passes on text give the bytes that they give in the process."""
    traced = moec.trace("tiny-deepseek-v3")
    plan = traced.optimize("cpu", context=64, chunk=16, dump=tmp_path / "dump")
    names = [r.name for r in plan.records]
    specs = [s for n in names for s in ("--pass", "mla-absorb{decode=absorbed}" if n == "mla-absorb" else n)]
    _, out, _ = run(capsys, "ir", "opt", tmp_path / "dump" / "00_import.ir", *specs, "--context", 64, "--chunk", 16)
    assert out == print_module(plan.ir)


def test_opt_gives_what_the_pipeline_gives_over_several_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sharded as asked, or as the text's mesh says; the schedule is the same."""
    traced = moec.trace("tiny-deepseek-v3")
    plan = traced.optimize(
        "h800", layout=LayoutRequest(ranks=4), dump=tmp_path / "dump", batch=64, context=64, chunk=64
    )
    sizes = ("--batch", 64, "--context", 64, "--chunk", 64)
    names = [r.name for r in plan.records]
    before = names.index("shard")
    for start, layout in ((0, ("--ranks", 4)), (before + 1, ())):
        file = tmp_path / "dump" / f"{start:02d}_{(['import', *names])[start]}.ir"
        specs = [s for name in names[start:] for s in ("--pass", name)]
        _, out, _ = run(capsys, "ir", "opt", file, *specs, *sizes, *layout)
        assert out == print_module(plan.ir)
    assert "event.wait" in out
    code, _, err = run(capsys, "ir", "opt", file, "--pass", "fuse", "--ranks", 4)
    assert code == 2 and "is sharded already: its mesh says how it lies" in err


def test_a_pass_that_matches_nothing_warns(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "ir", "opt", file, "--pass", "mla-absorb")
    assert code == 0
    assert "warning: no attn.mla over a cached latent" in err
    code, out, err = run(capsys, "ir", "opt", file, "--pass", "mla-absorb", "--strict")
    assert (code, out) == (2, "")
    assert "--strict" in err


def test_the_dump_holds_what_was_there_before_a_failure(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dump"
    code, _, _ = run(
        capsys, "ir", "opt", file, "--pass", "canonicalise", "--pass", "mla-absorb", "--strict", "--dump-ir", folder
    )
    assert code == 2
    assert sorted(p.name for p in folder.iterdir()) == [
        "00_import.ir", "01_canonicalise.ir", "02_mla-absorb.ir", "index.md", "report.html",
    ]  # fmt: skip
    page = (folder / "report.html").read_text()
    assert "warning: no attn.mla over a cached latent" in page
    assert "{{" not in page.replace("{{l}}", "")
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
