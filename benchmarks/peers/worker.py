"""One measurement in a process of its own: `python -m peers.worker JOB.json` ends with one JSON object on a line."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from moec.errors import MoecError
from moec.runtime.bench import peak_memory
from peers.registry import PEERS
from peers.runners import Ids, Runner, Settings


@dataclass(frozen=True)
class Job:
    """What to measure of one peer. `seconds`: after how long a decode measurement ends, with 4 steps at least."""

    peer: str
    settings: Settings
    prefill: tuple[int, ...]
    context: tuple[int, ...]
    batch: tuple[int, ...]
    new: int
    vocab: int
    seconds: float
    started: float


@dataclass(frozen=True)
class Measured:
    """Tokens a second by prompt length, by context, and by batch at the first context (all sequences together);
    seconds; bytes."""

    prefill: dict[int, float]
    decode: dict[int, float]
    batched: dict[int, float]
    load_s: float
    first_token_s: float
    peak_memory: int


def measure(job: Job) -> Measured:
    """Load, warm up (which also brings the weights into the page cache and sizes the decode measurement), measure."""
    began = time.perf_counter()
    runner = PEERS[job.peer].runner(job.settings)
    load_s = time.perf_counter() - began
    ids = np.random.default_rng(0).integers(0, job.vocab, max(*job.prefill, *job.context)).astype(np.int64)
    first: list[float] = []
    runner.generate(ids[: job.context[0]], 1, lambda: first.append(time.time() - job.started))
    runner.settle()
    warm = steps(runner, ids[: job.context[0]], 4)
    new = int(max(4, min(job.new, job.seconds / median(warm))))
    prefill = {}
    for tokens in job.prefill:
        start = time.perf_counter()
        runner.generate(ids[:tokens], 1, lambda: None)
        prefill[tokens] = tokens / (time.perf_counter() - start)
    decode = {tokens: 1 / median(steps(runner, ids[:tokens], new)) for tokens in job.context}
    batched = {}
    for batch in job.batch:
        prompts = np.random.default_rng(1).integers(0, job.vocab, (batch, job.context[0])).astype(np.int64)
        batched[batch] = batch / median(steps_together(runner, prompts, max(4, new // 2)))
    return Measured(prefill, decode, batched, load_s, first[0], peak_memory())


def steps(runner: Runner, ids: Ids, count: int) -> list[float]:
    """Seconds of `count` decode steps after the prompt `ids`."""
    stamps: list[float] = []
    runner.generate(ids, count + 1, lambda: stamps.append(time.perf_counter()))
    return [b - a for a, b in pairwise(stamps)]


def steps_together(runner: Runner, prompts: Ids, count: int) -> list[float]:
    """Seconds of `count` steps that decode a token after each row of `prompts`."""
    stamps: list[float] = []
    runner.generate_all(prompts, count + 1, lambda: stamps.append(time.perf_counter()))
    return [b - a for a, b in pairwise(stamps)]


def main() -> None:
    """Run the job of a file."""
    raw = json.loads(Path(sys.argv[1]).read_text())
    raw["settings"] = Settings(**raw["settings"])
    try:
        print(json.dumps(asdict(measure(Job(**raw)))))
    except MoecError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
