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
from moec.runtime.distributed.progress import Waiting
from moec.runtime.distributed.world import Exchange
from moec.runtime.launch import loaded


def main(request: dict[str, Any]) -> None:
    """Rank 0 leaves logits and tokens in the request's `out`."""
    path = request["artifact"]
    rank = int(os.environ["RANK"])
    if rank == request.get("other_rank"):
        path = request["other"]
    with loaded(path, False, 1, request.get("timeout", 30.0), request.get("parts", 1)) as model:
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
        if "windows" in request:
            fed = _fed(model)
            out["losses"] = np.concatenate(model.losses_of(request["windows"]))
            out["fed"] = np.array(sum(fed))
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


def _fed(model: Any) -> list[int]:
    """Grows by the tokens of every piece of a prompt that this rank computes."""
    counts: list[int] = []
    place = model.engine.place_piece

    def counting(sequence: Any, tokens: Any, last_only: bool) -> Any:
        counts.append(len(tokens))
        return place(sequence, tokens, last_only)

    model.engine.place_piece = counting
    return counts


def _watch(model: Any, routed: list[Any]) -> None:
    """Note the experts of every dispatch."""
    collectives = model.collectives
    dispatch = collectives._dispatch

    def noting(op: Any, axis: Any, layer: int, buffers: Any) -> None:
        routed.append(buffers.array(op.inputs[1]).tolist())
        dispatch(op, axis, layer, buffers)

    collectives._dispatch = noting


def _fail_at(model: Any, how: str, step: int) -> None:
    """Let the rank die, stop or hang before a decode step, or in its second exchange: before it sends, or behind."""
    how, _, where = how.partition(" ")
    decode, run, wait = model.engine.decode, model.collectives.run, Exchange.wait
    steps, exchanges = [0], [0]

    def fail() -> None:
        sys.stderr.write(f"failing at {time.time()}\n")
        if how == "hang":
            time.sleep(1000)
        if how == "error":
            raise OSError(5, "Input/output error")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])

    def stepping(*args: Any) -> Any:
        steps[0] += 1
        if steps[0] == step and not where:
            fail()
        return decode(*args)

    def exchanging(*args: Any) -> Any:
        exchanges[0] += steps[0] == step
        if exchanges[0] == 2 and where == "before sending":
            fail()
        return run(*args)

    def waiting(exchange: Exchange) -> None:
        if exchanges[0] == 2 and where == "behind sending":
            with model.world.progress.wait(Waiting(exchange.axis, exchange.number, exchange.ranks)):
                fail()
        wait(exchange)

    model.engine.decode, model.collectives.run = stepping, exchanging
    if where == "behind sending":
        Exchange.wait = waiting  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
