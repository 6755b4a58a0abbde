"""Artifacts for several GPUs against one: every rank runs its kernels in the interpreter, rows travel over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from whole_models import compile_uncompiled

import moec
from moec.codegen.triton.fused.groups import Group
from moec.codegen.triton.lower.order import Buffer, Order
from moec.codegen.triton.program import Program
from moec.ir import Op
from moec.passes.planning.layout import LayoutRequest

WORKER = Path(__file__).with_name("gpu_rank_worker.py")
SMALL = {"num_hidden_layers": "2", "first_k_dense_replace": "1"}
PROMPTS = [[5, 6, 7], [3]]
BOUND = 1e-5
"""Greatest difference of logits over the greatest logit, in float32."""
MESHES: dict[str, tuple[LayoutRequest, tuple[str, ...]]] = {
    "dp2-ep2-redundant": (LayoutRequest(ranks=2, redundant=2), ()),
    "tp2": (LayoutRequest(ranks=2, tp=2, ep=1), ()),
    "tp2-ep2": (LayoutRequest(ranks=2, tp=2), ()),
    "tp2-ep2-split": (LayoutRequest(ranks=2, tp=2), ("split-microbatches{count=2,phase=decode}",)),
    "dp2-ep2-split": (LayoutRequest(ranks=2), ("split-microbatches{count=2}",)),
    "pp2": (LayoutRequest(ranks=2, pp=2), ()),
    "dp2-tp2-ep4": (LayoutRequest(ranks=4, tp=2), ()),
    "dp4-ep4": (LayoutRequest(ranks=4), ()),
    "pp2-ep2": (LayoutRequest(ranks=4, pp=2), ()),
}


def compiled(out: Path, name: str = "", recipe: str = "fp32", batch: int = 2) -> Path:
    """An artifact whose kernels stay sources, for one device or a mesh."""
    layout, passes = MESHES[name] if name else (None, ())
    plan = moec.trace("tiny-deepseek-v3", SMALL).optimize(
        "h800", batch=batch, context=64, chunk=16, recipe=recipe, layout=layout, passes=passes
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compile", compile_uncompiled)
        return plan.compile(out, random_weights=0).path


def results(ranks: int, artifact: Path, folder: Path, ids: Any, chunks: list[int | None]) -> list[dict[str, Any]]:
    """What every rank computed."""
    folder.mkdir()
    request = {
        "artifact": str(artifact), "out": str(folder), "ids": ids.tolist(), "chunks": chunks, "prompts": PROMPTS,
        "new": 3,
    }  # fmt: skip
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *start, str(WORKER), json.dumps(request)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(ranks)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """Some prompts, and what a single device gives for them."""
    folder = tmp_path_factory.mktemp("one")
    ids = np.random.default_rng(0).integers(0, 768, (2, 3))
    return ids, results(1, compiled(folder / "one.moec"), folder / "out", ids, [None, 1])[0]


@pytest.mark.parametrize(
    "name",
    [n if n == "tp2-ep2-split" else pytest.param(n, marks=pytest.mark.slow) for n in MESHES],
)
def test_ranks_equal_one_device(name: str, one: Any, tmp_path: Path) -> None:
    """Prefill and captured decode steps, and greedy tokens; with more ranks than prompts, some have none."""
    ids, alone = one
    ranks = MESHES[name][0].ranks
    assert ranks is not None
    for found in results(ranks, compiled(tmp_path / "m.moec", name), tmp_path / "out", ids, [None, 1]):
        for key in ("logits_None", "logits_1"):
            worst = np.abs(found[key] - alone[key]).max() / np.abs(alone[key]).max()
            assert worst < BOUND, (key, worst)
        assert json.loads(str(found["tokens"])) == json.loads(str(alone["tokens"]))
        assert int(found["replays"]) > 0, "nothing was captured"


@pytest.mark.slow
def test_scales_travel_with_fp8_rows(tmp_path: Path) -> None:
    """Rows are quantised before they are sent: every rank computes what one device does, to BF16's rounding."""
    ids = np.random.default_rng(1).integers(0, 768, (2, 3))
    alone = results(1, compiled(tmp_path / "one.moec", recipe="deepseek-v3"), tmp_path / "a", ids, [None])[0]
    many = compiled(tmp_path / "m.moec", "dp2-ep2-redundant", "deepseek-v3")
    assert "fp8e4nv" in (many / "kernels" / "kernels.json").read_text()
    for found in results(2, many, tmp_path / "b", ids, [None]):
        worst = np.abs(found["logits_None"] - alone["logits_None"]).max() / alone["logits_None"].std()
        assert worst < 0.06, worst


def test_streams_keep_their_memory() -> None:
    """What a stream reads is not written over by another that has not waited for it, in this layer or the next."""

    def op(name: str, stream: str, **attrs: Any) -> Any:
        return Group([Op(name, [], {"stream": stream, **attrs}, [])], 0)

    groups = [
        op("norm.rms", "a"), op("event.record", "a", event=0), op("event.wait", "b", event=0), op("linear", "b"),
        op("add", "a"), op("event.record", "b", event=1), op("norm.rms", "a"), op("event.wait", "a", event=1),
        op("add", "a"),
    ]  # fmt: skip
    order = Order(groups)
    assert order.before("a", 0, "b", 3) and not order.before("a", 4, "b", 3) and order.before("a", 4, "a", 6)
    assert order.before("b", 3, "a", 8) and not order.before("b", 3, "a", 6)
    # b waits for a at 2 of every layer, so behind all of a's layer before.
    assert order.before_next("b", 3, "a", 0) and order.before_next("a", 8, "b", 3)
    assert not order.before_next("a", 8, "b", 1)

    def buffer(**uses: tuple[int, int]) -> Buffer:
        first, last = min(f for f, _ in uses.values()), max(t for _, t in uses.values())
        return Buffer(1, first, last, uses={s: u for s, u in uses.items()})

    read_by_b = buffer(a=(0, 0), b=(3, 3))
    assert order.meet(read_by_b, buffer(a=(4, 6))), "b may still read"
    assert not order.meet(buffer(a=(0, 0)), buffer(a=(4, 6)))
    assert not order.meet(buffer(b=(3, 3)), buffer(a=(8, 8))), "free behind the wait"
    assert order.turns(read_by_b, buffer(a=(0, 0)))
    # Without a's wait, b may still read when the next layer begins.
    loop = Order(groups[:7], loops=True)
    assert loop.meet(read_by_b, buffer(a=(0, 0))) and not loop.turns(read_by_b, buffer(a=(0, 0)))
