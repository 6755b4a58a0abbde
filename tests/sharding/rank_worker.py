"""One rank of a test: opens the artifact, computes what the request asks for, and fails where it is told to."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from moec.runtime.distributed.model import DistributedModel
from moec.runtime.launch import loaded


def main(request: dict[str, Any]) -> None:
    """Rank 0 leaves logits and tokens in the request's `out`."""
    path = request["artifact"]
    rank = int(os.environ["RANK"])
    if rank == request.get("other_rank"):
        path = request["other"]
    with loaded(path, False, 1, request.get("timeout", 30.0)) as model:
        out: dict[str, Any] = {}
        if "fail" in request and rank == request["rank"]:
            _fail_at(model, request["fail"], request["step"])
        routed: list[Any] = []
        if request.get("watch"):
            _watch(model, routed)
        for name, parts, hide in request.get("micro_batches", ()):
            out[f"decoded_{name}"] = _decoded(model.engine, parts, hide)
        if "ids" in request:
            ids = np.asarray(request["ids"])
            for chunk in request.get("chunks", (None, 7, 1)):
                out[f"logits_{chunk}"] = model.logits(ids, chunk=chunk)
        if "prompts" in request:
            out["tokens"] = np.array(json.dumps(model.generate(request["prompts"], request["new"], stop=())))
        if "out" in request:
            traffic = model.world.traffic() if isinstance(model, DistributedModel) else {}
            out["sent"], out["routed"] = (np.array(json.dumps(x)) for x in (dict(traffic), routed))
            np.savez(Path(request["out"]) / f"rank{rank}.npz", **out)


def _decoded(engine: Any, parts: int, hide: bool) -> Any:
    """Logits of some decode steps over sequences of this rank, in micro-batches.

    parts: 0 as one batch, -1 as the artifact's schedule says.
    """
    from moec.runtime.distributed.overlapped import Overlapped

    rank = int(os.environ["RANK"])
    draw = np.random.default_rng(rank)
    planned = engine._artifact.plan.decode
    given = engine.overlapped
    # Rank 0 has one sequence, so that some of its micro-batches have none; the others' differ in length.
    sequences = [engine.pool.open() for _ in range(engine.batch if rank else 1)]
    engine.overlapped = None
    for i in range(engine.batch):
        if i < len(sequences):
            engine.prefill(sequences[i], draw.integers(0, 50, 3 + i % 3))
    if parts < 0:
        engine.overlapped = Overlapped(engine, planned.parts, hide, planned.turns)
    elif parts:
        engine.overlapped = Overlapped(engine, parts, hide)
    steps = [engine.decode(sequences, draw.integers(0, 50, len(sequences)).tolist()).copy() for _ in range(4)]
    engine.overlapped = given
    for sequence in sequences:
        engine.pool.close(sequence)
    return np.stack(steps)


def _watch(model: Any, routed: list[Any]) -> None:
    """Note the experts of every dispatch."""
    collectives = model.collectives
    dispatch = collectives._dispatch

    def noting(op: Any, axis: Any, layer: int, buffers: Any) -> None:
        routed.append(buffers.array(op.inputs[1]).tolist())
        dispatch(op, axis, layer, buffers)

    collectives._dispatch = noting


def _fail_at(model: Any, how: str, step: int) -> None:
    """Let the rank die, stop or hang in a decode step."""
    engine, count = model.engine, [0]
    decode = engine.decode

    def failing(*args: Any) -> Any:
        count[0] += 1
        if count[0] == step:
            if how == "hang":
                time.sleep(1000)
            if how == "error":
                raise OSError(5, "Input/output error")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
        return decode(*args)

    engine.decode = failing


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
