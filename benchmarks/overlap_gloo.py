"""Decode over gloo processes with exchanges hidden behind the computation of another micro-batch, and without.

python benchmarks/overlap_gloo.py [--ranks 2] [--batch 256] [--link G] [--trace out.json] [--out results.json]

Compiles a random model of DeepSeek-V3's architecture (4 layers, hidden 1024, 16 experts) for the ranks and runs
`moec bench` on it under torchrun: decode steps of three kinds in turn, the whole batch, two micro-batches that wait for
each exchange, and two that hide them. Logits must be equal bit for bit between the last two.

Between processes of one machine data travels at the speed of memory, at the cost of the cores that compute: there is
little to hide. So everything is measured a second time with an emulated network card for each rank (`moec bench
--link`). Without `--link` here the card is as slow as makes the exchanges of a step take as long as everything else,
which the DeepSeek-V3 report (arXiv 2412.19437, sec. 3.2.1) says of its training. All kinds use the same card.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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


def main() -> None:
    """Compile, run both benches, print what they found."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        artifact: Path = options.artifact or Path(folder) / "model.moec"
        command = ["compile", "deepseek-v3", "--target", "cpu", "--ranks", str(options.ranks), "--out", str(artifact)]
        command += ["--batch", str(options.batch), "--context", "64", "--chunk", "16", "--random-weights", "0"]
        for key, value in MODEL.items():
            command += ["--set", f"{key}={value}"]
        if not artifact.exists():
            subprocess.run([sys.executable, "-m", "moec", *command], check=True, stderr=subprocess.DEVNULL)
        plain = _bench(options, artifact, [])
        gbit = options.link or plain["sent_bytes"] * 8 / (plain["whole_ms"] * 1e-3) / 1e9
        slow = _bench(options, artifact, ["--link", f"{gbit:.3g}"])
    for found in (plain, slow):
        _report(found)
    if options.out is not None:
        options.out.write_text(json.dumps({"ranks": options.ranks, "runs": [plain, slow]}) + "\n")
    if not (plain["same_logits"] and slow["same_logits"]):
        raise SystemExit(1)


def _bench(options: argparse.Namespace, artifact: Path, more: list[str]) -> dict[str, Any]:
    """What `moec bench` says of the overlap; prompts of one token, so that decode is what takes the time."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    run += ["-m", "moec", "bench", str(artifact), "--json", "--threads", "1", "--repeat", str(options.repeat)]
    run += ["--batch", str(options.batch * options.ranks), "--prompt-tokens", "1", "--new-tokens", "2", *more]
    run += ["--trace", str(options.trace)] if options.trace is not None else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    overlap = json.loads(done.stdout)["overlap"]
    assert isinstance(overlap, dict)
    return overlap


def _report(o: dict[str, Any]) -> None:
    card = o["link_gbit"]
    print("between processes" if card is None else f"with an emulated card of {card:.3g} Gbit/s a rank")
    kinds = {"whole": "whole batch", "awaited": "micro-batches, awaited", "hidden": "micro-batches, hidden"}
    for key, name in kinds.items():
        runs = " / ".join(f"{ms:.1f}" for ms in o[f"{key}_runs"])
        print(f"  {name:24} {o[f'{key}_ms']:8.1f} ms a step (runs {runs})")
    print(f"  exchanges {o['exchange_ms']:.1f} ms a step awaited, {o['exposed_ms']:.1f} ms exposed when hidden")
    gains = [o[f"{key}_ms"] / o["hidden_ms"] - 1 for key in ("awaited", "whole")]
    print(f"  hidden over awaited {gains[0]:+.1%}, over the whole batch {gains[1]:+.1%}")
    print(f"  logits bit for bit, hidden and awaited: {'equal' if o['same_logits'] else 'DIFFER'}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--batch", type=int, default=256, help="sequences of a rank (default 256)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each kind (default 5)")
    parser.add_argument("--link", type=float, default=0.0, help="Gbit/s of the emulated network card")
    parser.add_argument("--trace", type=Path, help="write the last hidden step of every rank as a Perfetto trace")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--artifact", type=Path, help="compile to this folder, or run what is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
