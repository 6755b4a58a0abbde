"""`moec simulate`: the timeline of a planned run, from the text of the scheduled module alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.output import note
from moec.figures import figures

if TYPE_CHECKING:
    from moec.ir import Function, Module
    from moec.simulate.trace import Span

_SHOWN_LAYERS = 3
"""Layers of the steady state in the picture."""


_EXAMPLES = """\
moec simulate v3.plan --trace timeline.json
moec simulate v3.plan --devices 16 --spread 0.05
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("simulate", epilog=_EXAMPLES)(simulate)


def simulate(
    plan: Annotated[
        str,
        typer.Argument(
            metavar="PLAN", help="An artifact, a folder of --plan-only, IR text, or a training plan (JSON)."
        ),
    ],
    phase: Annotated[
        str | None, typer.Option(help="prefill or decode.", show_default="the first that there is")
    ] = None,
    trace: Annotated[Path | None, typer.Option(metavar="OUT", help="Write a timeline for ui.perfetto.dev.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="OUT", help="Write a picture of some layers.")] = None,
    devices: Annotated[int, typer.Option(min=1, max=64, help="Devices that meet at every exchange.")] = 1,
    spread: Annotated[float, typer.Option(min=0.0, max=5.0, help="Relative scatter of durations, such as 0.05.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the scatter.")] = 0,
    measured: Annotated[
        Path | None, typer.Option("--beside", metavar="TRACE", help="Lay a measured trace over the timeline.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Simulate a scheduled phase event by event.

    Total time, what is hidden, what stragglers cost.
    """
    from moec.cli.ir_text import read_module
    from moec.ir import verify
    from moec.simulate.program import entry_of, run_program

    if plan.endswith(".json"):
        _training(plan, phase, devices, trace, svg, measured, spread, seed, as_json)
        return
    module = read_module(plan)
    verify(module)
    entry = entry_of(module, phase)
    spans = run_program(module, entry, _cores(module), devices, spread, seed)
    _write_trace(trace, spans, measured)
    _write_picture(svg, spans, _window(module, spans), f"@{entry.name} of {module.name}")
    answer = _answer(entry, spans)
    if as_json:
        print(json.dumps(answer, allow_nan=False))
    else:
        _print(answer)


def _cores(module: Module) -> int:
    """SMs or cores of the target; of one from a file that is not known here, the most that an op asks for."""
    from moec import targets
    from moec.targets.errors import UnknownTarget

    try:
        return int(targets.load(str(module.attrs.get("target", "cpu"))).device.cores)
    except UnknownTarget:
        return max((int(str(op.attrs["sms"])) for _, op in module.ops() if "sms" in op.attrs), default=1)


def _answer(entry: Function, spans: list[Span]) -> dict[str, Any]:
    from moec.simulate.program import LINK
    from moec.simulate.trace import EXPOSED_TRACK

    devices = list(dict.fromkeys(s.device for s in spans))
    busy: dict[str, float] = {}
    for span in spans:
        busy[span.track] = busy.get(span.track, 0.0) + span.us / len(devices)
    links = sum(s.us for s in spans if LINK in s.args) / len(devices)
    exposed = busy.pop(EXPOSED_TRACK, 0.0)
    return {
        "phase": entry.name,
        "devices": len(devices),
        "time_us": max(s.start_us + s.us for s in spans),
        "busy_us": busy,
        "communication_us": links,
        "exposed_us": exposed,
        "hidden": 1 - exposed / links if links else 1.0,
    }


def _print(answer: dict[str, Any]) -> None:
    print(f"{answer['phase']} on {answer['devices']} device(s): {figures(answer['time_us'] / 1e3)} ms")
    for stream, us in answer["busy_us"].items():
        print(f"  {stream:8} busy {figures(us / 1e3)} ms ({us / answer['time_us']:.1%})")
    if answer["communication_us"]:
        shown = f"{figures(answer['communication_us'] / 1e3)} ms, {answer['hidden']:.1%} of it hidden"
        print(f"  communication {shown}, {figures(answer['exposed_us'] / 1e3)} ms exposed")


def _training(
    plan: str, phase: str | None, devices: int, trace: Path | None, svg: Path | None, measured: Path | None,
    spread: float, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Simulate the pipeline of a training step."""
    from moec.cli.options import UsageError
    from moec.simulate.training import read_training

    if phase not in (None, "train") or devices > 1:
        raise UsageError(message="a training plan is simulated on its own ranks: leave --phase and --devices out")
    step = read_training(plan)
    spans, report = step.run(spread, seed)
    _write_trace(trace, spans, measured)
    _write_picture(svg, spans, (0.0, report.length), f"{step.pipe.schedule}, {len(step.pipe.programs)} ranks")
    answer: dict[str, Any] = {
        "phase": "train",
        "schedule": step.pipe.schedule,
        "ranks": len(step.pipe.programs),
        "micro_batches": step.pipe.micro_batches,
        "step_us": report.length + step.optimiser_us,
        "bubble_us": sum(report.idle) / len(report.idle),
        "worst_bubble_us": max(report.idle),
        "formula_bubble_us": step.formula_us,
        "activations": max(report.activations),
    }
    if as_json:
        print(json.dumps(answer, allow_nan=False))
        return
    print(f"{answer['schedule']} on {answer['ranks']} ranks, {answer['micro_batches']} micro-batches: step "
          f"{answer['step_us'] / 1e6:.3f} s")  # fmt: skip
    print(f"  bubble {answer['bubble_us'] / 1e6:.3f} s on average, {answer['worst_bubble_us'] / 1e6:.3f} s at most; "
          f"by the published formula {step.formula_us / 1e6:.3f} s")  # fmt: skip


def _write_trace(path: Path | None, spans: list[Span], measured: Path | None) -> None:
    from moec.cli.options import UsageError
    from moec.simulate.measured import beside
    from moec.simulate.trace import read_trace, write_trace

    if measured is not None and path is None:
        raise UsageError(message="--beside needs --trace OUT, where both timelines go")
    if path is not None:
        write_trace(path, spans if measured is None else beside(spans, read_trace(measured)))
        note(f"wrote {path} (open it at ui.perfetto.dev)")


def _write_picture(path: Path | None, spans: list[Span], window: tuple[float, float], title: str) -> None:
    from moec.files import write_whole
    from moec.simulate.picture import picture

    if path is None:
        return
    write_whole(path, picture(spans, *window, title))
    note(f"wrote {path}")


def _window(module: Module, spans: list[Span]) -> tuple[float, float]:
    """A few layers of the steady state, or all of a short run."""
    end = max(s.start_us + s.us for s in spans)
    intervals = [float(str(f.attrs["interval_us"])) for f in module.functions.values() if "interval_us" in f.attrs]
    width = _SHOWN_LAYERS * max(intervals, default=end)
    middle = end / 2
    return (0.0, end) if width >= end else (middle - width / 2, middle + width / 2)
