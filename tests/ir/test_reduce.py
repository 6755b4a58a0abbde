"""`moec ir reduce`: small, minimal, parsing modules that still fail, and few runs of the command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parser_texts import GOOD
from random_modules import modules
from test_ir_commands import run

import moec
from moec.ir import OPS, Module, parse_module, print_module
from moec.ir.reduce import REMOVALS, _Reducer, reduce
from moec.passes.planning import LayoutRequest


@pytest.fixture(scope="module")
def module() -> Module:
    return moec.trace("tiny-deepseek-v3").optimize("cpu", context=64, chunk=16).ir


@pytest.mark.parametrize(
    "op", ["norm.add_rms", "moe.route", "moe.experts", "attn.mla_absorbed", "cache.append", "repeat", "embed", "split"]
)
def test_one_op_is_left(module: Module, op: str) -> None:
    """A failure that an op alone causes ends with that op alone, after few runs."""
    runs = 0

    def fails(text: str) -> bool:
        nonlocal runs
        runs += 1
        parse_module(text)
        return any(o.name == op for _, o in parse_module(text).ops())

    small = reduce(module, fails)
    assert [o.name for _, o in small.ops()] == [op]
    assert not small.weights
    assert len(small.functions) == (2 if op == "repeat" else 1)
    assert runs < 60


@pytest.mark.parametrize("op", ["weight.pack", "weight.transpose", "weight.quantise"])
def test_a_weight_program_is_cut_on_both_sides(module: Module, op: str) -> None:
    small = reduce(module, lambda text: f" = {op} " in text)
    (weight,) = small.weights.values()
    assert not small.functions
    assert [o.name for o in weight.program.ops][1:] == [op]


def test_two_ops_that_only_fail_together(module: Module) -> None:
    """One fed by the other, in one function."""

    def fails(text: str) -> bool:
        return any(
            o.name == "swiglu" and f.producer().get(o.operands[0]) is not None  # type: ignore[arg-type]
            and f.producer()[o.operands[0]].name == "linear"  # type: ignore[index]
            for f, o in parse_module(text).ops()
        )  # fmt: skip

    small = reduce(module, fails)
    assert [o.name for _, o in small.ops()] == ["linear", "swiglu"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(modules(), st.data())
def test_random_modules_become_minimal(module: Module, data: st.DataObject) -> None:
    """Nothing single can be left out of the result, whatever the op that makes it fail."""
    names = sorted({o.name for _, o in module.ops()})
    if not names:
        return
    op = data.draw(st.sampled_from(names))
    assert op in OPS

    def fails(text: str) -> bool:
        return any(o.name == op for _, o in parse_module(text).ops())

    small = reduce(module, fails)
    assert fails(print_module(small))
    again = _Reducer(small, fails)
    for items, remove in REMOVALS:
        for item in items(small):
            assert not again._attempt(lambda m, item=item, remove=remove: remove(m, [item]))  # type: ignore[misc]


def test_the_command_keeps_the_exit_code_and_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, script = tmp_path / "m.ir", tmp_path / "fail.py"
    file.write_text(GOOD)
    script.write_text(
        "import sys\ntext = open(sys.argv[1]).read()\n"
        "print('swiglu' in text and 'no kernel for swiglu')\nsys.exit(3 if 'swiglu' in text else 4)\n"
    )
    command = f"{sys.executable} -S {script} {{}}"
    code, out, err = run(capsys, "ir", "reduce", file, "--run", command, "--match", "no kernel")
    assert code == 0, err
    assert [o.name for _, o in parse_module(out).ops()] == ["swiglu"]
    assert "5 -> 1 ops in 1 functions" in err
    small = tmp_path / "small.ir"
    assert run(capsys, "ir", "reduce", file, "--run", command, "--out", small)[:2] == (0, "")
    assert small.read_text() == out


def test_standard_input_and_a_command_that_hangs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard input when the command names no file; a hang is a failure of its own kind."""
    file = tmp_path / "m.ir"
    file.write_text(GOOD)
    code, out, _ = run(capsys, "ir", "reduce", file, "--run", "grep -q swiglu && sleep 60; exit 0", "--timeout", 0.3)
    assert code == 0
    assert [o.name for _, o in parse_module(out).ops()] == ["swiglu"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("--run", "true"), "the command succeeds on the whole module: nothing to reduce (command: true)"),
        (("--run", "false", "--match", "x"), "the command fails without 'x' in its output"),
        (("--run", "no-such-program {}"), "the command cannot be run: "),
    ],
)
def test_nothing_to_reduce(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], message: str
) -> None:
    file = tmp_path / "m.ir"
    file.write_text(GOOD)
    code, out, err = run(capsys, "ir", "reduce", file, *command)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_scheduled_module_over_several_ranks() -> None:
    """Calls, events, and where and when ops run: all of it goes that may."""
    plan = moec.trace("tiny-deepseek-v3").optimize("h800", batch=64, context=64, layout=LayoutRequest(ranks=4))
    assert "event.wait" in print_module(plan.ir)
    small = reduce(plan.ir, lambda text: "moe.experts" in text and "comm.dispatch" in text)
    assert sorted(op.name for _, op in small.ops()) == ["comm.dispatch", "moe.experts"]
    assert not any({"us", "stream", "micro_batch"} & set(op.attrs) for _, op in small.ops())
