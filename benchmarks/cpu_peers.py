"""moec beside llama.cpp and transformers on this CPU: prefill and decode rates, start, memory, the machine's bounds.

Run: python benchmarks/cpu_peers.py [--model bench-4b] [--small] [--peers moec,llama-q8] [--prefill 256,1024]
     [--context 128,4096] [--batch 4,16] [--rounds 3] [--json OUT] [--plot OUT.png]

Weights are random, made once in the work folder. In every round each peer runs in a process of its own, one after the
other (A B C A B C), so that each has the whole machine and its memory; medians over rounds count. docs/benchmarks.md
says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from peers import geometry, registry
from peers.limits import Limits
from peers.report import as_json, plot, rows, table
from peers.runners import Settings
from peers.worker import Job, Measured

from moec.errors import InputError, MoecError

FOLDER = Path(__file__).resolve().parent


class WrongNumber(InputError):
    """A length or count that cannot be measured."""

    template: ClassVar[str] = "--{option} {value}: {expected}"


class WorkerFailed(MoecError):
    """A peer's process that gave no result."""

    template: ClassVar[str] = "{peer}: {why}"


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bench-4b", help="preset, or folder with a config.json")
    parser.add_argument("--small", action="store_true", help="the preset's variant with tiny sizes, two short rounds")
    parser.add_argument(
        "--peers", help=f"of {','.join(registry.PEERS)}; default: all installed; ratios are to the first"
    )
    parser.add_argument("--prefill", default=None, help="prompt lengths (default 256; 16 with --small)")
    parser.add_argument("--context", default=None, help="tokens in the cache before decoding (default 128; 16)")
    parser.add_argument("--batch", default=None, help="sequences that decode together, at the first context (none)")
    parser.add_argument("--new-tokens", type=int, default=64, help="decode steps of a round at most")
    parser.add_argument("--seconds", type=float, default=15.0, help="a slow peer's decode steps end after about this")
    parser.add_argument("--rounds", type=int, default=None, help="rounds (default 3; 2 with --small)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every peer")
    parser.add_argument("--work", type=Path, default=Path("out/cpu-peers"), help="folder for models, kept between runs")
    parser.add_argument(
        "--artifact",
        action="append",
        default=[],
        metavar="PEER=FOLDER",
        help="a compiled artifact instead of a new one",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything to a file")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write a picture (needs matplotlib)")
    return parser.parse_args()


def numbers(option: str, text: str, most: int) -> tuple[int, ...]:
    """Positive integers of a comma-separated list, at most `most`; raises WrongNumber."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdigit() or not 1 <= int(part) <= most:
            raise WrongNumber(option=option, value=text, expected=f"integers from 1 to {most}, separated by commas")
    return tuple(dict.fromkeys(int(part) for part in parts))


def environment(threads: int) -> dict[str, str]:
    """Of the peers' processes: as many threads as asked for every library, and the modules of this folder."""
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS")}
    # How threads wait is each peer's own choice: a setting from outside would slow one of them.
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return {**kept, **counts, "PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))}


def child(peer: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """The JSON object on the last line of a process's output; raises WorkerFailed."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(threads))
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise WorkerFailed(peer=peer, why=lines[-1] if lines else f"its process ended with {done.returncode}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


def run(job: Job) -> Measured:
    """Measure one peer in a new process."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asdict(replace(job, started=time.time())), file)
        file.flush()
        found = child(job.peer, ["peers.worker", file.name], job.settings.threads)
    for phase in ("prefill", "decode", "batched"):
        found[phase] = {int(tokens): rate for tokens, rate in found[phase].items()}
    return Measured(**found)


def fitting(names: list[str], c: Any, note: Callable[[str], None]) -> list[str]:
    """The peers whose weights fit the memory that is free now."""
    free = available()
    kept = []
    for name in names:
        needed = registry.weight_bytes(registry.PEERS[name], c)
        if free is not None and needed > free:
            note(f"{name} left out: its weights take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
        else:
            kept.append(name)
    return kept


def available() -> float | None:
    """Bytes of memory that can be had without swapping (Linux)."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return float(fields["MemAvailable"].split()[0]) * 1024


def compare(o: argparse.Namespace) -> None:
    """Make the models, run the rounds, report."""

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    c = geometry.source(o.model, o.small).config
    most = c.max_position_embeddings
    prefill = numbers("prefill", o.prefill or ("16" if o.small else "256"), most)
    context = numbers("context", o.context or ("16" if o.small else "128"), most - 2)
    batch = numbers("batch", o.batch, 256) if o.batch else ()
    rounds = (2 if o.small else 3) if o.rounds is None else o.rounds
    for option, value in (("rounds", rounds), ("new-tokens", o.new_tokens), ("threads", o.threads)):
        if value < 1:
            raise WrongNumber(option=option, value=value, expected="at least 1")
    new = min(o.new_tokens, most - max(context) - 1)
    if o.plot and not registry.installed("matplotlib"):
        raise registry.MissingPackage(name="--plot", packages="matplotlib")
    names = fitting(registry.chosen(o.peers), c, note)
    widest = max(batch, default=1)
    tokens = -(-max(*prefill, max(context) + max(new, 4) + widest) // 256) * 256
    o.work.mkdir(parents=True, exist_ok=True)
    jobs = {}
    given = registry.artifacts(o.artifact)
    for name in names:
        note(f"{name}: model")
        make = registry.PEERS[name].make
        file = given.get(name) or (str(make(o.work, o.model, o.small, tokens, widest)) if make else "")
        settings = Settings(o.model, o.small, file, o.threads, tokens, max(prefill), widest)
        jobs[name] = Job(name, settings, prefill, context, batch, new, c.vocab_size, o.seconds, 0.0)
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    best = Limits(o.threads, 0.0, 0.0)
    for number in range(1, rounds + 1):
        found = Limits(**child("limits", ["peers.limits", str(o.threads)], o.threads))
        best = Limits(
            o.threads,
            max(best.bandwidth, found.bandwidth),
            max(best.peak, found.peak),
            max(best.tiles, found.tiles),
        )
        for name, job in jobs.items():
            result = run(job)
            measured[name].append(result)
            rates = [
                f"{phase} {v:.1f}"
                for phase in ("prefill", "decode", "batched")
                for v in getattr(result, phase).values()
            ]
            note(f"round {number} of {rounds}, {name}: {', '.join(rates)} tokens/s")
    out = rows(c, best, measured)
    print(table(best, out))
    if o.json:
        facts = {"model": o.model, "small": o.small, "rounds": rounds, "new_tokens": new, "versions": versions()}
        part = o.json.with_name(o.json.name + ".part")
        part.write_text(json.dumps(as_json(facts, best, out), indent=1))
        os.replace(part, o.json)
    if o.plot:
        plot(o.plot, out)


def versions() -> dict[str, str]:
    """Of the packages measured."""
    found = {}
    for package in ("moec", "apache-tvm", "torch", "transformers", "llama-cpp-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    try:
        compare(options())
    except MoecError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
