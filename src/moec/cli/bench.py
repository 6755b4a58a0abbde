"""`moec bench`: how fast an artifact is on this machine, beside what its memory allows."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moec.runtime.bench import Result


def register(app: typer.Typer) -> None:
    """Add `moec bench`."""
    app.command("bench")(bench)


def bench(
    artifact: Annotated[str, typer.Argument(help="Folder that `moec compile` wrote.")],
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Prompt length (default 256, or half the compiled context).")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="New tokens a run (default 64, or what fits).")] = None,
    repeat: Annotated[int, typer.Option(help="Timed runs; the medians count.")] = 3,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of the kernels (default: all usable CPUs).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure prefill and decode rates, load time and memory."""
    from moec.runtime import bench as measuring

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    result = measuring.bench(artifact, prompt_tokens, new_tokens, repeat, batch, threads, note)
    print(json.dumps(asdict(result)) if as_json else _table(result))


def _table(r: Result) -> str:
    bound = "not known: this system does not tell which pages were read"
    if r.step_weight_bytes and r.decode_bound_tokens_per_s and r.share_of_bound:
        read = f"{r.step_weight_bytes / 1e6:,.1f} MB of weights a step at {r.read_bandwidth / 1e9:.1f} GB/s measured"
        bound = f"{r.decode_bound_tokens_per_s:,.1f} tokens/s ({read}); reached {r.share_of_bound:.0%}"
    rows = [
        ("model", f"{r.model}, {r.recipe}, target {r.target}, {r.threads} threads, batch {r.batch}"),
        ("prefill", f"{r.prefill_tokens_per_s:,.1f} tokens/s, median of {r.repeat} x {r.prompt_tokens} tokens"),
        ("decode", f"{r.decode_tokens_per_s:,.1f} tokens/s, median of {r.repeat} x {r.new_tokens} tokens"),
        ("decode bound", bound),
        ("load", f"{r.load_s:.2f} s"),
        ("peak memory", f"{r.peak_memory_bytes / 2**20:,.0f} MiB; weights {r.weight_bytes / 2**20:,.0f} MiB"),
    ]
    return "\n".join(f"{name:13} {value}" for name, value in rows)
