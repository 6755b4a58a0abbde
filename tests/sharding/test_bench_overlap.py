"""`moec bench` on several ranks: the overlap that it reports, its trace, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_models import CASES, compiled

from moec.runtime.distributed.bench import _joined
from moec.simulate.trace import EXPOSED_TRACK, read_trace

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moec"]


def bench(artifact: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, "bench", str(artifact), "--threads", "1", "--repeat", "1", "--new-tokens", "2", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=150, env=env)


def test_exchanges_of_an_emulated_card_and_what_of_them_stays_exposed(tmp_path: Path) -> None:
    artifact = compiled("tiny-deepseek-v3", tmp_path / "m.moec", "fp32", CASES["ep2"])
    done = bench(artifact, "--batch", "4", "--json", "--link", "0.01", "--trace", str(tmp_path / "trace.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    overlap = json.loads(done.stdout)["overlap"]
    assert overlap["same_logits"] and not overlap["scheduled"]
    assert (overlap["parts"], overlap["sequences"], overlap["link_gbit"]) == (2, 4, 0.01)
    assert overlap["sent_bytes"] > 0
    # A card cannot be faster than it is, whoever waits for it.
    assert overlap["exchange_ms"] >= 0.5 * overlap["sent_bytes"] * 8 / 0.01e9 * 1e3
    spans = read_trace(tmp_path / "trace.json")
    assert {s.device for s in spans} == {"rank 0", "rank 1"}
    assert {s.track for s in spans} == {"compute", "comm", EXPOSED_TRACK}


@pytest.mark.slow
def test_one_sequence_leaves_nothing_to_overlap(tmp_path: Path) -> None:
    artifact = compiled("tiny-deepseek-v3", tmp_path / "m.moec", "fp32", CASES["ep2"])
    done = bench(artifact)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "overlap       not measured: no second micro-batch of 1 sequences on 2 replicas" in done.stdout
    refused = bench(artifact, "--trace", str(tmp_path / "t.json"))
    assert refused.returncode == 2 or "nothing is written" in refused.stderr
    assert not (tmp_path / "t.json").exists()


def told(awaited: float, hidden: float, digest: str) -> tuple[list[Any], int]:
    """What a rank measured of a whole batch of 9 s and two kinds of micro-batches."""
    ran = [("dispatch.0 1", "comm", 0.0, 5.0)]
    kinds = [([9.0], [0.0], ["x"], []), ([8.0], [awaited], ["a"], ran), ([7.0], [hidden], [digest], ran)]
    return kinds, 100


def test_what_ranks_measured_is_joined() -> None:
    result = _joined([told(2.0, 1.0, "a"), told(4.0, 0.0, "a")], 2, True, 8, None)
    assert (result.whole_ms, result.awaited_ms, result.hidden_ms) == (9000.0, 8000.0, 7000.0)
    assert (result.exchange_ms, result.exposed_ms) == (3000.0, 500.0)
    assert result.same_logits
    assert not _joined([told(2.0, 1.0, "a"), told(4.0, 0.0, "b")], 2, True, 8, None).same_logits
