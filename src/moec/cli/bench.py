"""`moec bench`: how fast an artifact is on this machine, beside what its memory allows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.arguments import Threads
from moec.cli.command import INSIDE, PROCESS, WORK
from moec.errors import InputError

if TYPE_CHECKING:
    from moec.profile import Profile
    from moec.runtime.bench import Result
    from moec.runtime.bench_speculate import Speculated
    from moec.runtime.distributed.bench import OverlapResult


class TextWithoutSpeculation(InputError):
    """--text alone."""

    template = "--text gives the prompts of --speculate: give both"


class TraceWithoutProfile(InputError):
    """--trace alone, in one process."""

    template = "--trace writes what --profile measures, or the overlap on several ranks: give --profile or use torchrun"


class LinkWithoutRanks(InputError):
    """--link in one process."""

    template = "--link emulates the network card of each of several ranks: start them with torchrun"


class NothingToTrace(InputError):
    """--trace where no overlap was measured."""

    template = "--trace: no overlap was measured ({why}), nothing is written"


class OtherMeasurement(InputError):
    """Options that the measurement asked for does not look at."""

    template = "{measurement} is a measurement of its own: leave {options} away"


class OneProcess(InputError):
    """What only one process measures, under torchrun."""

    template = (
        "--profile, --calibration-rows and --speculate measure one process: "
        "compile without --ranks, leave torchrun away"
    )


_EXAMPLES = """\
moec bench tiny.moec --prompt-tokens 128 --batch 1
moec bench tiny.moec --profile --trace steps.json
"""


def register(app: typer.Typer) -> None:
    """Add `moec bench`."""
    app.command("bench", epilog=_EXAMPLES)(bench)


def bench(
    artifact: Annotated[str, typer.Argument(help="Folder that `moec compile` wrote.")],
    prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Prompt length.", show_default="256, or half the compiled context", rich_help_panel=WORK),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="New tokens a run.", show_default="64, or what fits", rich_help_panel=WORK)
    ] = None,
    repeat: Annotated[int, typer.Option(help="Timed runs; the medians count.", rich_help_panel=PROCESS)] = 3,
    batch: Annotated[int, typer.Option(help="Sequences at a time.", rich_help_panel=WORK)] = 1,
    threads: Threads = None,
    speculate: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Compare decoding with up to N drafted tokens a step with plain one.",
            rich_help_panel=WORK,
        ),
    ] = 0,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --speculate: a text whose parts are the prompts.", rich_help_panel=WORK
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Time every op of a step instead, beside what the machine allows.", rich_help_panel=INSIDE
        ),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.json",
            help="For Perfetto: with --profile a step of each phase, on ranks the overlapped one.",
            rich_help_panel=INSIDE,
        ),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(
            metavar="GBIT",
            min=1e-6,
            help="On ranks: emulate a network card of so many Gbit/s for each.",
            rich_help_panel=PROCESS,
        ),
    ] = None,
    calibration_rows: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.jsonl",
            help="Time every op instead, as rows for `moec targets calibrate`.",
            rich_help_panel=INSIDE,
        ),
    ] = None,
    micro_batches: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Under torchrun, with --pp: parts of a decode step under way at a time.",
            rich_help_panel=PROCESS,
        ),
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure prefill and decode rates, load time and memory.

    --profile says where the time of a step goes, --speculate what drafts bring.
    """
    from moec.cli.options import UsageError
    from moec.cli.output import check_file
    from moec.runtime.launch import first, launched

    if launched() and (profile or calibration_rows is not None or speculate):
        raise OneProcess()
    if link is not None and not launched():
        raise LinkWithoutRanks()
    if micro_batches > 1 and not launched():
        raise UsageError(message="--micro-batches is for several processes: start them with torchrun")
    given = {
        "--prompt-tokens": prompt_tokens is not None,
        "--new-tokens": new_tokens is not None,
        "--batch": batch != 1,
        "--text": text is not None,
        "--trace": trace is not None,
        "--profile": profile,
        "--calibration-rows": calibration_rows is not None,
    }
    check_file("--trace", trace)
    check_file("--calibration-rows", calibration_rows)
    if speculate:
        _alone("--speculate", given, "--profile", "--calibration-rows", "--trace")
    if calibration_rows is not None:
        _alone("--calibration-rows", given, *(option for option in given if option != "--calibration-rows"))
        _rows(artifact, repeat, threads, calibration_rows, as_json)
        return
    if profile:
        _alone("--profile", given, "--new-tokens", "--batch", "--text")
        _profile(artifact, prompt_tokens, repeat, threads, trace, as_json)
        return
    if trace is not None and not launched():
        raise TraceWithoutProfile()
    if text is not None and not speculate:
        raise TextWithoutSpeculation()

    def note(text: str) -> None:
        if first():
            print(text, file=sys.stderr)

    if speculate:
        from moec.cli.eval import read_text
        from moec.runtime.bench_speculate import bench_speculation

        content = None if text is None else read_text(text)
        found = bench_speculation(artifact, speculate, content, prompt_tokens, new_tokens, repeat, batch, threads, note)
        print(json.dumps(asdict(found)) if as_json else _speculated_table(found))
        return
    from moec.runtime import bench as measuring

    result = measuring.bench(artifact, prompt_tokens, new_tokens, repeat, batch, threads, note, link, micro_batches)
    if trace is not None:
        _trace_overlap(trace, result)
    if not first():
        return
    if as_json:
        fields = asdict(result)
        if fields["overlap"] is not None:
            del fields["overlap"]["ran"]  # that is what --trace writes
        print(json.dumps(fields))
        return
    print(_table(result))


def _alone(measurement: str, given: Mapping[str, bool], *others: str) -> None:
    """Raise OtherMeasurement for options that a measurement does not look at."""
    if idle := [option for option in others if given[option]]:
        raise OtherMeasurement(measurement=measurement, options=" and ".join(idle))


def _trace_overlap(trace: Path, result: Result) -> None:
    """The overlapped step of every rank, written by the first one."""
    from moec.runtime.launch import first
    from moec.simulate.measured import measured
    from moec.simulate.trace import write_trace

    if result.overlap is None:
        raise NothingToTrace(why=result.no_overlap)
    if first():
        write_trace(trace, [s for k, ran in enumerate(result.overlap.ran) for s in measured(ran, f"rank {k}")])


def _profile(
    artifact: str, tokens: int | None, repeat: int, threads: int | None, trace: Path | None, as_json: bool
) -> None:
    from moec.profile import profile
    from moec.runtime import load

    model = load(artifact, threads=threads)
    model.engine.weights.settle()
    context = max(1, min(256, model.context // 2)) if tokens is None else tokens
    found = [profile(model, "decode", context, repeat)]
    found.append(profile(model, "prefill", min(context, model.engine.chunk), repeat))
    if trace is not None:
        from moec.simulate.trace import Span, write_trace

        write_trace(
            trace,
            [
                Span(s.name, f"layer {s.layer}" if s.layer is not None else "step", s.start_us, s.us, p.phase)
                for p in found
                for s in p.spans
            ],
        )
    print(json.dumps([p.as_json() for p in found]) if as_json else "\n\n".join(map(_profile_table, found)))


def _rows(artifact: str, repeat: int, threads: int | None, out: Path, as_json: bool) -> None:
    from moec.files import write_whole
    from moec.profile import calibration_rows
    from moec.runtime import load

    model = load(artifact, threads=threads)
    model.engine.weights.settle()
    rows = calibration_rows(model, max(repeat, 8))
    write_whole(out, "".join(f"{json.dumps(row)}\n" for row in rows))
    ops = sorted({row["op"] for row in rows})
    print(
        json.dumps({"out": str(out), "rows": len(rows), "ops": ops}) if as_json else f"wrote {len(rows)} rows to {out}"
    )


def _profile_table(p: Profile) -> str:
    known = [o for o in p.ops if o.predicted_us is not None]
    predicted = sum(o.predicted_us or 0.0 for o in known)
    lines = [
        f"{p.phase} of {p.tokens} tokens at context {p.context}: {p.plain_step_us:,.0f} us ({p.step_us:,.0f} profiled)"
        f"; bound {sum(o.bound_us for o in p.ops):,.0f} us at {p.bandwidth / 1e9:.1f} GB/s, "
        f"{p.product_peak / 1e9:,.0f} GFLOP/s in products and {p.peak / 1e9:,.0f} elsewhere; "
        f"cost model {predicted:,.0f} us for ops that took {sum(o.us for o in known):,.0f}",
        f"{'op':18} {'function':24} {'calls':>5} {'us':>9} {'share':>6} {'bound us':>9} {'of bound':>8} "
        f"{'model us':>9} {'model/us':>8}  result",
    ]
    whole = sum(o.us for o in p.ops)
    for o in p.ops:
        model = "" if o.predicted_us is None else f"{o.predicted_us:,.0f}"
        ratio = "" if o.predicted_us is None else f"{o.predicted_us / o.us:.2f}"
        lines.append(
            f"{o.name:18} {o.function:24} {o.calls:5} {o.us:9,.0f} {o.us / whole:6.1%} {o.bound_us:9,.0f} "
            f"{o.bound_us / o.us:8.0%} {model:>9} {ratio:>8}  {o.result}"
        )
    return "\n".join(lines)


def _speculated_table(s: Speculated) -> str:
    agreement = "" if s.agreement is None else f"; on the text itself its choice is the model's at {s.agreement:.1%}"
    step = f"{s.draft_ms:.3f} ms of drafting and {s.verify_ms:.3f} ms of verification for {s.step_ms:.3f} ms"
    rows = [
        ("model", f"{s.model}, {s.recipe}, {s.threads} threads, batch {s.batch}"),
        ("prompts", f"{s.prompts} of {s.prompt_tokens} tokens, {s.new_tokens} new ones each, greedy"),
        ("same tokens", "yes" if s.same_tokens else "NO"),
        ("acceptance", f"{s.acceptance:.1%} of the drafted tokens ({s.drafts} a step){agreement}"),
        ("tokens a step", f"{s.tokens_per_step:.2f} in place of 1"),
        ("a step", f"{step}: {s.expected_speed_up:.2f}x expected"),
        ("decode", f"{s.tokens_per_s:,.1f} tokens/s, {s.plain_tokens_per_s:,.1f} without drafts: {s.speed_up:.2f}x"),
    ]
    return "\n".join(f"{name:13} {value}" for name, value in rows)


def _table(r: Result) -> str:
    bound = "not known: this system does not tell which pages were read"
    ranks = f", {r.ranks} ranks" if r.ranks > 1 else ""
    if ranks:
        bound = "not measured over several ranks"
    if r.step_weight_bytes and r.decode_bound_tokens_per_s and r.share_of_bound:
        read = f"{r.step_weight_bytes / 1e6:,.1f} MB of weights a step at {r.read_bandwidth / 1e9:.1f} GB/s measured"
        bound = f"{r.decode_bound_tokens_per_s:,.1f} tokens/s ({read}); reached {r.share_of_bound:.0%} run by run"
    rows: list[tuple[str, str]] = [
        ("model", f"{r.model}, {r.recipe}, target {r.target}, {r.threads} threads, batch {r.batch}{ranks}"),
        ("prefill", f"{r.prefill_tokens_per_s:,.1f} tokens/s, median of {r.repeat} x {r.prompt_tokens} tokens"),
        ("decode", f"{r.decode_tokens_per_s:,.1f} tokens/s, median of {r.repeat} x {r.new_tokens} tokens"),
        ("decode bound", bound),
        ("load", f"{r.load_s:.2f} s"),
        ("peak memory", f"{r.peak_memory_bytes / 2**20:,.0f} MiB; weights {r.weight_bytes / 2**20:,.0f} MiB"),
    ]
    if r.overlap is not None:
        rows += _overlap_rows(r.overlap)
    elif ranks:
        rows.append(("overlap", f"not measured: {r.no_overlap}"))
    return "\n".join(f"{name:13} {value}" for name, value in rows)


def _overlap_rows(o: OverlapResult) -> list[tuple[str, str]]:
    link = "data as processes of these machines exchange them"
    if o.link_gbit is not None:
        link = f"an EMULATED network card of {o.link_gbit:.3g} Gbit/s a rank"
    how = "in the order of the artifact's schedule" if o.scheduled else "changing at every exchange"
    hidden = f", {1 - o.exposed_ms / o.exchange_ms:.0%} hidden" if o.exposed_ms <= o.exchange_ms else ""
    gains = [f"{ms / o.hidden_ms - 1:+.1%}" for ms in (o.awaited_ms, o.whole_ms)]
    return [
        ("overlap", f"{o.parts} micro-batches {how}, {o.sequences} sequences in all; {link}"),
        ("exchanges", f"{o.exchange_ms:,.2f} ms a step awaited, {o.exposed_ms:,.2f} ms exposed when hidden{hidden}"),
        ("step", f"{o.hidden_ms:,.2f} ms hidden, {o.awaited_ms:,.2f} awaited ({gains[0]} rate), "
                 f"{o.whole_ms:,.2f} as one batch ({gains[1]})"),
        ("same logits", "yes, bit for bit, hidden and awaited" if o.same_logits else "NO"),
    ]  # fmt: skip
