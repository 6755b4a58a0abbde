"""What a GPU artifact's programs hold: every op has a kernel, every kernel an op, and the arena has room for all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rotate_parts import AddUnrotated
from whole_models import compile_uncompiled

import moec
from moec.codegen.triton.errors import CheckFailed, NoKernel
from moec.codegen.triton.fused.groups import VIEWS, groups_of
from moec.codegen.triton.lower.lower import Lowering
from moec.codegen.triton.lower.order import CONTROL
from moec.codegen.triton.program import Program, compiled_program, lower_module
from moec.ir import Module, Op, parse_module, print_op
from moec.passes import registry

PRESETS = ("deepseek-v3", "deepseek-v2-lite", "kimi-k2", "moonlight-16b", "tiny-deepseek-v3")


def lowered(model: str, target: str, **options: Any) -> tuple[Module, Program]:
    plan = moec.trace(model).optimize(target, **options)
    limits = plan.context.limits
    return plan.ir, lower_module(plan.ir, plan.context.target, vars(limits))


def launches(steps: list[Any]) -> Iterator[Mapping[str, Any]]:
    for step in steps:
        yield from launches(step["steps"]) if "repeat" in step else [step]


@pytest.mark.parametrize("target", ["h800", "a100", "b200", "mi300x"])
@pytest.mark.parametrize("model", PRESETS)
def test_every_op_has_a_kernel(model: str, target: str) -> None:
    module, program = lowered(model, target)
    done = {
        (function, i)
        for entry in program.table.entries.values()
        for function, indices in entry.uses.items()
        for i in indices
    }
    for function in module.functions.values():
        for i, op in enumerate(function.ops):
            assert (function.name, i) in done or op.name in CONTROL, op.name
    used = {s["kernel"] for p in program.phases.values() for s in launches(p.steps) if "kernel" in s}
    assert {*used, program.draw["kernel"]} == set(program.table.entries)


def test_a_part_is_rotated_in_place_only_if_nobody_reads_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}
    judge = Lowering.rotates_in_place

    def noted(self: Lowering, op: Op) -> bool:
        found = asked[f"{self.function.name} {print_op(op)}"] = judge(self, op)
        return found

    monkeypatch.setattr(Lowering, "rotates_in_place", noted)
    monkeypatch.setattr(registry, "BUILT_IN", (*registry.BUILT_IN, AddUnrotated))
    lowered("tiny-deepseek-v3", "h800", recipe="bf16", phase="decode")
    assert asked and all(asked.values())
    asked.clear()
    with suppress(NoKernel):  # the group that such a rotation falls into may have no kernel
        lowered("tiny-deepseek-v3", "h800", recipe="bf16", phase="decode", passes=["add-unrotated"])
    keys = [found for op, found in asked.items() if ": bf16[T, 16]" in op]
    assert keys and not any(keys)


def test_kernels_json_of_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields of the format, the ops of the program and no others, and files that say where they come from."""
    monkeypatch.setattr(Program, "compile", compile_uncompiled)
    plan = moec.trace("deepseek-v3").optimize("h800", phase="decode")
    plan.compile(tmp_path / "v3.moec", no_weights=True)
    folder = tmp_path / "v3.moec/kernels"
    records = json.loads((folder / "kernels.json").read_text())
    fields = {"name", "ops", "cubin", "ptx", "registers", "spill_stores", "spills_listed", "shared_bytes"}
    assert all(fields | {"tensor_instruction"} <= set(r) for r in records)
    module = parse_module((tmp_path / "v3.moec/program.ir").read_text())
    ops = {op.name for _, op in module.ops() if op.name not in CONTROL}
    assert {op for r in records for op in r["ops"]} == {*ops, "sample.draw"}
    for r in records:
        assert (folder / r["cubin"]).is_file() and (folder / r["ptx"]).is_file()
        source = folder / f"{r['launch']['function'].partition(':')[0]}.py"
        assert source.is_file()
        for function, indices in r["uses"].items():
            assert {module.functions[function].ops[i].name for i in indices} <= set(r["ops"])
    text = (folder / "linear_swiglu_quant_cast.py").read_text()
    assert "# @dense_layers.decode" in text and "@dense_layers.mlp.gate_up[%l]" in text


def test_what_is_fused_follows_the_program() -> None:
    """Groups of a DeepSeek-V3 decode layer in FP8: chains of row-wise ops, and products with their epilogues."""
    module, _ = lowered("deepseek-v3", "h800", phase="decode")
    groups = [[op.name for op in g.ops] for g in groups_of(module.functions["moe_layers.decode"])]
    assert ["norm.rms", "rope", "cache.append"] in groups
    assert ["norm.add_rms", "quant.cast"] in groups
    assert ["linear", "swiglu", "quant.cast"] in groups
    assert ["moe.combine", "add", "add"] in groups
    dense = [[op.name for op in g.ops] for g in groups_of(module.functions["dense_layers.decode"])]
    assert ["linear", "add"] in dense
    assert not any(name in VIEWS for g in groups for name in g)


def test_buffers_that_live_at_once_do_not_overlap() -> None:
    """Every launch of a layer reads and writes places of the arena that lie apart, but for results written in place."""
    _, program = lowered("deepseek-v3", "h800")
    for phase in program.phases.values():
        for step in launches(phase.steps):
            for value in step.get("arguments", {}).values():
                if isinstance(value, dict) and value["base"] == "arena":
                    assert 0 <= value["offset"] < phase.arena and value["offset"] % 16 == 0


def test_layers_are_not_unrolled() -> None:
    """The plan of 122 layers is as long as that of 61."""
    sizes = []
    for layers in ("61", "122"):
        plan = moec.trace("deepseek-v3", {"num_hidden_layers": layers}).optimize("h800")
        program = lower_module(plan.ir, plan.context.target, vars(plan.context.limits))
        sizes.append(len(list(launches(program.phases["decode"].steps))))
    assert sizes[0] == sizes[1]


def test_what_no_kernel_can_do_is_said() -> None:
    plan = moec.trace("deepseek-v3").optimize("h800", recipe="per-tensor")
    with pytest.raises(NoKernel, match=r"no GPU kernel for quant\.cast: granularity"):
        lower_module(plan.ir, plan.context.target, vars(plan.context.limits))


def test_a_tile_that_fails_its_checks_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next of the menu, or a spare of a declared kernel; where there is none the failure is told."""
    plan = moec.trace("gpt-oss-20b").optimize("h800", phase="decode")
    tried: list[Program] = []

    def compile_once(program: Program, jobs: int = 0) -> list[Any]:
        tried.append(program)
        instances = [e.instance for e in program.table.entries.values()]
        if len(tried) == 1:
            wrong = [i for i in instances if i.origin.startswith("predicted") or i.spec.spares]
            raise CheckFailed(name="x", arch="sm_90a", problems="it spills", instances=wrong)
        return compile_uncompiled(program)

    monkeypatch.setattr(Program, "compile", compile_once)
    module, target, limits = plan.ir, plan.context.target, vars(plan.context.limits)
    program, compiled = compiled_program(module, target, limits)
    assert len(tried) == 2 and "tiles replaced because" in program.note(compiled)
    before, after = ([e.instance for e in p.table.entries.values()] for p in tried)
    for old, new in zip(before, after, strict=True):
        other = old.origin.startswith("predicted") or bool(old.spec.spares)
        assert (old.tile.facts != new.tile.facts) == other

    def fails(program: Program, jobs: int = 0) -> list[Any]:
        routing = [e.instance for e in program.table.entries.values() if e.instance.spec.name.startswith("permutation")]
        raise CheckFailed(name=routing[0].name, arch="sm_90a", problems="it spills", instances=routing)

    monkeypatch.setattr(Program, "compile", fails)
    with pytest.raises(CheckFailed, match="it spills"):
        compiled_program(module, target, limits)
