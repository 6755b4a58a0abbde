"""`moec compile --plan-only`: the program and the decisions for GPU targets, without kernels and weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moec
from moec.ir import TensorType, parse_module, verify
from moec.passes.planning import LayoutRequest


@pytest.mark.parametrize("target", ["h800-ep144", "h100", "a100", "b200", "mi300x"])
def test_a_plan_is_written_and_reads_back(target: str, tmp_path: Path) -> None:
    """Tensors between ops are 16 bits or less, matrices row-major, and the mesh is the target's."""
    plan = moec.trace("deepseek-v3").optimize(target)
    plan.save(tmp_path / "p")
    module = parse_module((tmp_path / "p/program.ir").read_text())
    verify(module)
    decided = json.loads((tmp_path / "p/plan.json").read_text())
    assert decided["mesh"]["ranks"] == (144 if target == "h800-ep144" else 1)
    assert decided["forms"] == {"prefill": "plain", "decode": "absorbed"}
    assert [p["name"] for p in decided["passes"]] == [r.name for r in plan.records]
    assert not any(isinstance(w.type, TensorType) and w.type.layout for w in module.weights.values())
    for _, op in module.ops():
        if op.name in ("norm.rms", "add", "swiglu", "rope"):
            assert isinstance(op.results[0].type, TensorType) and op.results[0].type.dtype == "bf16"


def test_one_phase_and_other_ranks(tmp_path: Path) -> None:
    plan = moec.trace("deepseek-v3", {"num_hidden_layers": "8"}).optimize(
        "h800", phase="decode", layout=LayoutRequest(ranks=16, ep=8)
    )
    assert set(plan.ir.functions) == {"dense_layers.decode", "moe_layers.decode", "decode"}
    assert plan.context.layout is not None and (plan.context.layout.ranks, plan.context.layout.ep) == (16, 8)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        moec.trace("deepseek-v2-lite").optimize("h100").save(tmp_path / name)
    for file in ("manifest.json", "plan.json", "program.ir"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
