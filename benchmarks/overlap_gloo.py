"""Decode over gloo processes with exchanges hidden behind the computation of another micro-batch, and without.

python benchmarks/overlap_gloo.py [--ranks 2] [--batch 256] [--link G] [--trace out.json] [--out results.json]

Compiles a random model of DeepSeek-V3's architecture (4 layers, hidden 1024, 16 experts) for the ranks, starts them
with torchrun and times decode steps of three kinds in turn: the whole batch, two micro-batches that wait for each
exchange, and two that hide them. Logits must be equal bit for bit between the last two.

Between processes of one machine data travels at the speed of memory, at the cost of the cores that compute: there is
little to hide. So everything is measured a second time with an emulated network card of G Gbit/s for each rank: a
dispatch or combine is over when gloo has moved the data and the card would have sent them, one after the other; the
rank sleeps for what is missing, so that no core is busy meanwhile. Without `--link` the card is as slow as makes the
exchanges of a step take as long as everything else, which the DeepSeek-V3 report (arXiv 2412.19437, sec. 3.2.1) says of
its training. All kinds use the same card.
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

from moec.simulate.measured import COMM, measured
from moec.simulate.trace import EXPOSED_TRACK, write_trace

MODEL = {
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_attention_heads": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "vocab_size": 4096,
}
PROMPT, STEPS, ROUNDS = 3, 4, 5
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
        run += ["--link", str(options.link)] if options.link else []
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
        planned = engine.overlapped
        turns = planned.turns if planned is not None else ()
        kinds: list[Any] = [None, Overlapped(engine, 2, hide=False, turns=turns), Overlapped(engine, 2, turns=turns)]
        engine.overlapped = None
        rank = int(os.environ["RANK"])
        draw = np.random.default_rng(rank)
        sequences = [engine.pool.open() for _ in range(options.batch)]
        for sequence in sequences:
            engine.prefill(sequence, draw.integers(0, MODEL["vocab_size"], PROMPT))
        tokens = draw.integers(0, MODEL["vocab_size"], (STEPS, options.batch)).tolist()
        measured = [_rounds(engine, kinds, sequences, tokens)]
        gbit = options.link or _gbit(model.world, engine, sequences, tokens)  # type: ignore[attr-defined]
        _slow(gbit)
        measured.append(_rounds(engine, kinds, sequences, tokens))
        told: list[Any] = model.world.gather({"gbit": gbit, "runs": measured})  # type: ignore[attr-defined]
        if rank == 0:
            options.out.write_text(json.dumps(told))


def _rounds(engine: Any, kinds: list[Any], sequences: list[Any], tokens: list[list[int]]) -> dict[str, Any]:
    """Seconds a step of every kind in each round, the digests of its logits, and what the last hidden step did."""
    times: list[list[float]] = [[] for _ in kinds]
    digests: list[set[str]] = [set() for _ in kinds]
    ran: list[Any] = []
    for round_ in range(ROUNDS + 1):
        for kind, overlapped in enumerate(kinds):
            last = round_ == ROUNDS and kind == len(kinds) - 1
            seconds, digest = _decode(engine, overlapped, sequences, tokens, ran if last else None)
            digests[kind].add(digest)
            if round_:
                times[kind].append(seconds)
    return {"times": times, "digests": [sorted(d) for d in digests], "ran": ran}


def _gbit(world: Any, engine: Any, sequences: list[Any], tokens: list[list[int]]) -> float:
    """Gbit/s of a card that takes as long for a step's exchanges as the rest of the step takes, on the slowest rank."""
    sent = sum(int(axis.sent.sum()) for axis in world.axes.values())
    seconds, _ = _decode(engine, None, sequences, tokens, None)
    sent = sum(int(axis.sent.sum()) for axis in world.axes.values()) - sent
    return float(min(told for told in world.gather(sent / STEPS * 8 / seconds / 1e9)))


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
    engine: Any, overlapped: Any, sequences: list[Any], tokens: list[list[int]], ran: list[Any] | None
) -> tuple[float, str]:
    """Seconds of a step and a digest of all logits; the sequences are as before afterwards."""
    engine.overlapped = overlapped
    digest, seconds = hashlib.sha256(), []
    for step, given in enumerate(tokens):
        if overlapped is not None:
            overlapped.ran = [] if ran is not None and step == STEPS - 1 else None
        engine.world.agree(0)
        began = time.perf_counter()
        logits = engine.decode(sequences, given)
        seconds.append(time.perf_counter() - began)
        digest.update(np.ascontiguousarray(logits).tobytes())
        if ran is not None and overlapped is not None and overlapped.ran:
            ran += [(r.name, r.stream, (r.start - began) * 1e6, (r.end - r.start) * 1e6) for r in overlapped.ran]
    for sequence in sequences:
        sequence.length -= STEPS
    return statistics.median(seconds), digest.hexdigest()


def _report(options: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    rows = []
    for run, card in enumerate((None, found[0]["gbit"])):
        print("between processes" if card is None else f"with an emulated card of {card:.3g} Gbit/s a rank")
        rows.append({"link_gbit": card, **_compare([rank["runs"][run] for rank in found])})
    spans = [span for k, rank in enumerate(found) for span in measured(rank["runs"][-1]["ran"], f"rank {k}")]
    step = max(s.start_us + s.us for s in spans)
    links = sum(s.us for s in spans if s.track == COMM)
    shown = sum(s.us for s in spans if s.track == EXPOSED_TRACK)
    print(f"  last hidden step: {step / 1e3:.1f} ms, {1 - shown / links:.1%} of the exchanges' time hidden")
    if options.trace is not None:
        write_trace(options.trace, spans)
    if options.out is not None:
        options.out.write_text(json.dumps({"ranks": options.ranks, "batch": options.batch, "runs": rows}) + "\n")
    if not all(row["equal"] for row in rows):
        raise SystemExit(1)


def _compare(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    medians = []
    for kind, name in enumerate(KINDS):
        rounds = [max(rank["times"][kind][i] for rank in ranks) * 1e3 for i in range(ROUNDS)]
        medians.append(statistics.median(rounds))
        print(f"  {name:28} {medians[-1]:8.1f} ms a step (rounds {' / '.join(f'{ms:.1f}' for ms in rounds)})")
    equal = all(rank["digests"][1] == rank["digests"][2] and len(rank["digests"][2]) == 1 for rank in ranks)
    whole = all(rank["digests"][0] == rank["digests"][2] for rank in ranks)
    gains = [medians[k] / medians[2] - 1 for k in (1, 0)]
    print(f"  hidden over waiting {gains[0]:+.1%}, over the whole batch {gains[1]:+.1%}")
    same, other = "equal" if equal else "DIFFER", "equal" if whole else "different: products of other sizes"
    print(f"  logits bit for bit: hidden and waiting {same}, whole batch {other}")
    return {"ms": medians, "equal": equal, "whole_equal": whole}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--batch", type=int, default=256, help="sequences of a rank (default 256)")
    parser.add_argument("--link", type=float, default=0.0, help="Gbit/s of the emulated network card")
    parser.add_argument("--trace", type=Path, help="write the last hidden step of every rank as a Perfetto trace")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--artifact", type=Path, help="compile to this folder, or run what is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
