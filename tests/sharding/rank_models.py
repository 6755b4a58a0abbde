"""Artifacts over several processes and the runs that compare them with one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_models import make_model

import moec
from moec.passes.planning.layout import LayoutRequest

WORKER = Path(__file__).parent / "rank_worker.py"
CONTEXT, CHUNK, BATCH = 64, 16, 2


@dataclass(frozen=True)
class Case:
    """A mesh: degrees, extra passes, and whether a placement with copies of popular experts is set."""

    request: LayoutRequest
    passes: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Processes to start."""
        assert self.request.ranks is not None
        return self.request.ranks


CASES = {
    "ep2": Case(LayoutRequest(ranks=2)),
    "ep3-redundant": Case(LayoutRequest(ranks=3)),
    "ep4": Case(LayoutRequest(ranks=4)),
    "ep4-redundant": Case(LayoutRequest(ranks=4, redundant=4)),
    "tp2": Case(LayoutRequest(ranks=2, tp=2, ep=1)),
    "tp2-ep2": Case(LayoutRequest(ranks=2, tp=2)),
    "tp4": Case(LayoutRequest(ranks=4, tp=4, ep=1)),
    "dp2-tp2-ep4-forwarded": Case(LayoutRequest(ranks=4, tp=2), ("shard{via=node,per_node=2}",)),
    "dp4-two-expert-groups": Case(LayoutRequest(ranks=4, ep=2)),
    "pp2": Case(LayoutRequest(ranks=2, pp=2)),
    "pp3": Case(LayoutRequest(ranks=3, pp=3)),
    "pp2-ep2": Case(LayoutRequest(ranks=4, pp=2)),
    "pp2-tp2": Case(LayoutRequest(ranks=4, pp=2, tp=2, ep=1)),
}


def skewed(variant: str, folder: Path, seed: int = 0, **sizes: int) -> Path:
    """A random small model whose router prefers its first experts by far, in Hugging Face layout."""
    model = make_model(variant, seed, **sizes)
    with torch.no_grad():
        for key, bias in model.named_buffers():
            if "e_score_correction_bias" in key:
                bias[: len(bias) // 4] += 0.5
    model.save_pretrained(folder)
    return folder


def compiled(model: Path | str, out: Path, recipe: str = "fp32", case: Case | None = None) -> Path:
    """An artifact of `model`: of one process, or over the ranks of a case."""
    layout, passes = (case.request, case.passes) if case else (None, ())
    plan = moec.trace(str(model)).optimize(
        "cpu", batch=BATCH, context=CONTEXT, chunk=CHUNK, recipe=recipe, layout=layout, passes=passes
    )
    return plan.compile(out).path


def launch(ranks: int, request: dict[str, Any], seconds: float = 150) -> subprocess.CompletedProcess[str]:
    """Run the worker on every rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(WORKER), json.dumps(request)], capture_output=True, text=True, timeout=seconds, env=env
    )


def results(ranks: int, artifact: Path, folder: Path, **request: Any) -> list[dict[str, Any]]:
    """What every rank computed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = launch(ranks, {"artifact": str(artifact), "out": str(folder), **request})
    assert done.returncode == 0, done.stderr[-3000:]
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(ranks)]
