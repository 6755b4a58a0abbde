"""Prompts and decode steps over the stages of a pipeline, one piece at a time and several under way.

    python benchmarks/pipeline_stages.py [--ranks 2] [--batch 16] [--out results.json]

Compiles a random model of DeepSeek-V3's architecture (the one of overlap_gloo.py, one stage a rank), starts gloo
processes with torchrun and times, in turn: a prompt of eight chunks, chunk by chunk and with chunks under way
together; a decode step of the batch as a whole and in 2 and 4 micro-batches. Logits of the prompt must be equal bit for
bit. The ideal gain of n pieces over p stages of the same length is p n / (n + p - 1).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from overlap_gloo import MODEL

CHUNK, CHUNKS, STEPS, ROUNDS = 128, 8, 4, 5
PARTS = (1, 2, 4)


def main() -> None:
    """Compile, start the ranks, print the slowest rank's medians."""
    options = _options()
    if options.worker:
        _work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        artifact: Path = options.artifact or Path(folder) / "model.moec"
        command = ["compile", "deepseek-v3", "--target", "cpu", "--pp", str(options.ranks), "--out", str(artifact)]
        command += ["--ranks", str(options.ranks), "--batch", str(options.batch), "--chunk", str(CHUNK)]
        command += ["--context", str(CHUNK * CHUNKS), "--random-weights", "0"]
        for key, value in MODEL.items():
            command += ["--set", f"{key}={value}"]
        if not artifact.exists():
            subprocess.run([sys.executable, "-m", "moec", *command], check=True, stderr=subprocess.DEVNULL)
        results = Path(folder) / "results.json"
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        run += [__file__, "--worker", "--artifact", str(artifact), "--batch", str(options.batch), "--out", str(results)]
        subprocess.run(run, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        ranks = json.loads(results.read_text())
    found = {name: _slowest([rank[name] for rank in ranks]) for name in ranks[0] if name != "equal"}
    one = found["prompt, chunk by chunk"]
    for name, ms in found.items():
        base = one if name.startswith("prompt") else found["decode, 1 part"]
        print(f"{name:28} {ms:8.1f} ms   {base / ms:.2f} x")
    n, p = CHUNKS, options.ranks
    equal = all(rank["equal"] for rank in ranks)
    print(f"ideal of {n} chunks over {p} equal stages {p * n / (n + p - 1):.2f} x; logits equal bit for bit: {equal}")
    if options.out is not None:
        options.out.write_text(json.dumps({"ranks": options.ranks, "batch": options.batch, "ms": found}) + "\n")


def _slowest(rounds: list[list[float]]) -> float:
    """Median over the rounds of the slowest rank's milliseconds."""
    return float(statistics.median(max(times) for times in zip(*rounds, strict=True)))


def _work(options: argparse.Namespace) -> None:
    """One rank: rounds of all kinds, each from the same state."""
    from moec.runtime.launch import loaded

    with loaded(str(options.artifact), False, 1, 60.0) as model:
        engine: Any = model.engine
        draw = np.random.default_rng(0)
        prompt = draw.integers(0, MODEL["vocab_size"], CHUNK * CHUNKS)
        pieces = [prompt[i : i + CHUNK] for i in range(0, len(prompt), CHUNK)]
        times: dict[str, list[float]] = {}
        logits: dict[bool, Any] = {}

        def timed(name: str, began: float) -> None:
            times.setdefault(name, []).append((time.perf_counter() - began) * 1e3)

        for _ in range(ROUNDS + 1):
            for together in (False, True):
                sequence = engine.pool.open()
                engine.world.agree(0)
                began = time.perf_counter()
                if together:
                    *_, last = engine.feed(sequence, pieces)
                else:
                    for piece in pieces:
                        last = engine.prefill(sequence, piece)
                timed("prompt, chunks together" if together else "prompt, chunk by chunk", began)
                logits[together] = last.copy()
                engine.pool.close(sequence)
            sequences = [engine.pool.open() for _ in range(options.batch)]
            for sequence in sequences:
                engine.prefill(sequence, prompt[:3])
            for parts in PARTS:
                engine.micro_batches = parts
                engine.world.agree(0)
                began = time.perf_counter()
                for step in range(STEPS):
                    engine.decode(sequences, prompt[step : step + options.batch].tolist())
                timed(f"decode, {parts} part{'s' * (parts > 1)}", began)
                for sequence in sequences:
                    sequence.length -= STEPS
            for sequence in sequences:
                engine.pool.close(sequence)
        mine = {name: [t / (STEPS if name[0] == "d" else 1) for t in some[1:]] for name, some in times.items()}
        equal = bool(np.array_equal(logits[False], logits[True]))
        told = engine.world.gather({**mine, "equal": equal})
        if os.environ["RANK"] == "0":
            options.out.write_text(json.dumps(told))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, each a stage (default 2)")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a decode step (default 16)")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--artifact", type=Path, help="compile to this folder, or run what is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
