"""Decode over gloo processes with exchanges hidden behind the computation of another micro-batch, and without.

python benchmarks/overlap_gloo.py [--ranks 2] [--batch 96] [--link 0.25] [--trace out.json] [--out results.json]

Compiles a random model of DeepSeek-V3's architecture (6 layers, hidden 1024, 32 experts) for the ranks, starts them
with torchrun and times decode steps of three kinds in turn: the whole batch, two micro-batches that wait for each
exchange, and two that hide them. Logits must be equal bit for bit between the last two.

Between processes of one machine data travels at the speed of memory, at the cost of the cores that compute. `--link G`
emulates a network card of G Gbit/s for each rank: a dispatch or combine is over when gloo has moved the data and the
card would have sent them, one after the other; no core is busy meanwhile. All kinds use the same link.
"""

from __future__ import annotations

import argparse
import hashlib
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

MODEL = {
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_attention_heads": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "vocab_size": 4096,
}
PROMPT, STEPS, ROUNDS = 3, 4, 3
KINDS = ("whole batch", "two micro-batches, waiting", "two micro-batches, hidden")


def main() -> None:
    """Compile, start the ranks, print what rank 0 found."""
    options = _options()
    if options.worker:
        _work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        artifact: Path = options.artifact or Path(folder) / "model.moec"
        command = ["compile", "deepseek-v3", "--target", "cpu", "--ranks", str(options.ranks), "--out", str(artifact)]
        command += ["--batch", str(options.batch), "--context", "64", "--chunk", "16", "--random-weights", "0"]
        for key, value in MODEL.items():
            command += ["--set", f"{key}={value}"]
        if not artifact.exists():
            subprocess.run([sys.executable, "-m", "moec", *command], check=True, stderr=subprocess.DEVNULL)
        results = Path(folder) / "results.json"
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        run += [__file__, "--worker", "--artifact", str(artifact), "--batch", str(options.batch), "--out", str(results)]
        run += ["--link", str(options.link)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(run, check=True, env=environment)
        found = json.loads(results.read_text())
    _report(options, found)


def _work(options: argparse.Namespace) -> None:
    """One rank: rounds of all kinds, each from the same state."""
    from moec.runtime.distributed.overlapped import Overlapped
    from moec.runtime.launch import loaded

    with loaded(str(options.artifact), False, 1, 60.0) as model:
        engine: Any = model.engine
        kinds: list[Any] = [None, Overlapped(engine, 2, hide=False), Overlapped(engine, 2)]
        rank = int(os.environ["RANK"])
        times: list[list[float]] = [[] for _ in kinds]
        digests: list[set[str]] = [set() for _ in kinds]
        spans: list[Any] = []
        draw = np.random.default_rng(rank)
        sequences = [engine.pool.open() for _ in range(options.batch)]
        for sequence in sequences:
            engine.prefill(sequence, draw.integers(0, MODEL["vocab_size"], PROMPT))
        tokens = draw.integers(0, MODEL["vocab_size"], (STEPS, options.batch)).tolist()
        if options.link:
            _slow(options.link)
        for round_ in range(ROUNDS + 1):
            for kind, overlapped in enumerate(kinds):
                last = round_ == ROUNDS and kind == len(kinds) - 1
                seconds, digest = _decode(engine, overlapped, sequences, tokens, spans if last else None)
                digests[kind].add(digest)
                if round_:
                    times[kind].append(seconds)
        mine = {"times": times, "digests": [sorted(d) for d in digests], "spans": spans}
        told: list[Any] = model.world.gather(mine)  # type: ignore[attr-defined]
        if rank == 0:
            options.out.write_text(json.dumps(told))


def _slow(gbit: float) -> None:
    """Give every rank a network card of so many Gbit/s."""
    from moec.runtime.distributed.world import Axis

    start = Axis.start_rows
    free = [0.0]

    class Sent:
        def __init__(self, work: Any, due: float) -> None:
            self.work, self.due = work, due

        def wait(self) -> None:
            self.work.wait()
            time.sleep(max(0.0, self.due - time.perf_counter()))

    def start_rows(axis: Any, x: Any, sent: Any, got: Any) -> Any:
        before = int(axis.sent.sum())
        work, out = start(axis, x, sent, got)
        away = int(axis.sent.sum()) - before
        free[0] = max(free[0], time.perf_counter()) + away * 8 / (gbit * 1e9)
        return Sent(work, free[0]), out

    Axis.start_rows = start_rows  # type: ignore[method-assign, assignment]


def _decode(
    engine: Any, overlapped: Any, sequences: list[Any], tokens: list[list[int]], spans: list[Any] | None
) -> tuple[float, str]:
    """Seconds of a step and a digest of all logits; the sequences are as before afterwards."""
    engine.overlapped = overlapped
    digest, seconds = hashlib.sha256(), []
    for step, given in enumerate(tokens):
        if overlapped is not None:
            overlapped.ran = [] if spans is not None and step == STEPS - 1 else None
        engine.world.agree(0)
        began = time.perf_counter()
        logits = engine.decode(sequences, given)
        seconds.append(time.perf_counter() - began)
        digest.update(np.ascontiguousarray(logits).tobytes())
        if spans is not None and overlapped is not None and overlapped.ran:
            spans += [(r.name, r.stream, (r.start - began) * 1e6, (r.end - r.start) * 1e6) for r in overlapped.ran]
    for sequence in sequences:
        sequence.length -= STEPS
    return statistics.median(seconds), digest.hexdigest()


def _report(options: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    medians = []
    for kind, name in enumerate(KINDS):
        rounds = [max(rank["times"][kind][i] for rank in found) * 1e3 for i in range(ROUNDS)]
        medians.append(statistics.median(rounds))
        shown = " / ".join(f"{ms:.2f}" for ms in rounds)
        print(f"{name:28} {medians[-1]:8.2f} ms a step (rounds {shown})")
    equal = all(rank["digests"][1] == rank["digests"][2] and len(rank["digests"][2]) == 1 for rank in found)
    whole = all(rank["digests"][0] == rank["digests"][2] for rank in found)
    gains = [medians[k] / medians[2] - 1 for k in (1, 0)]
    print(f"hidden over waiting {gains[0]:+.1%}, over the whole batch {gains[1]:+.1%}")
    same, other = "equal" if equal else "DIFFER", "equal" if whole else "different: products of other sizes"
    print(f"logits bit for bit: hidden and waiting {same}, whole batch {other}")
    if options.trace is not None:
        from moec.simulate.trace import Span, write_trace

        spans = [Span(n, s, start, us, f"rank {k}") for k, r in enumerate(found) for n, s, start, us in r["spans"]]
        write_trace(options.trace, spans)
    if options.out is not None:
        options.out.write_text(json.dumps({"ranks": options.ranks, "link_gbit": options.link, "ms": medians}) + "\n")
    if not equal:
        raise SystemExit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--batch", type=int, default=96, help="sequences of a rank (default 96)")
    parser.add_argument("--link", type=float, default=0.0, help="Gbit/s of an emulated network card (default: none)")
    parser.add_argument("--trace", type=Path, help="write the last hidden step of every rank as a Perfetto trace")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--artifact", type=Path, help="compile to this folder, or run what is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
