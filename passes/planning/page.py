"""A plan as one HTML page with plots that needs no network: roofline, breakdown, latency and rate over the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from moec.files import write_whole
from moec.ir import Module
from moec.passes.planning.advice import alternatives
from moec.passes.planning.plan import PhasePlan, Plan
from moec.passes.planning.plots import batch_curve, breakdown, legend, roofline
from moec.passes.planning.search import Bench, Candidate

_POINTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def write_page(path: Path, model: str, module: Module, plans: Sequence[Plan]) -> None:
    """Write the page of one or several plans, whole or not at all; raises NotWritten."""
    title = f"{model} on {', '.join(plan.target.name for plan in plans)}"
    text = files("moec.passes.planning").joinpath("page.html").read_text(encoding="utf-8")
    text = text.replace("{{TITLE}}", escape(title)).replace("{{LEGEND}}", legend())
    text = text.replace("{{PLANS}}", "".join(_plan(module, plan) for plan in plans))
    write_whole(path, text)


def _plan(module: Module, plan: Plan) -> str:
    layout = plan.layout
    degrees = f"TP {layout.tp}, DP {layout.dp}, PP {layout.pp}"
    if layout.experts:
        degrees += f", EP {layout.ep} with {layout.slots_per_device} of {layout.slots} experts a device"
    parts = [f"<h2>{escape(plan.target.name)}</h2>"]
    parts.append(f'<p class="lead">{layout.ranks} devices, {degrees}; recipe {escape(plan.recipe.name)}</p>')
    parts += [f'<p class="lead">{escape(note)}</p>' for note in plan.notes]
    parts += [f'<p class="warning">{escape(warning)}</p>' for warning in plan.warnings]
    parts.append(_table(plan))
    parts.append(_advice(module, plan))
    for name, phase in plan.phases.items():
        parts.append(f"<h3>{name}: roofline and breakdown</h3>")
        parts.append(f'<div class="pair">{roofline(phase)}{breakdown(phase)}</div>')
    parts.append("<h3>decode: latency and rate over the batch</h3>")
    curve = batch_curve(_points(module, plan), plan.options.batch, plan.target.device.memory_bytes)
    parts.append(f'<div class="pair">{curve}</div>')
    return "\n".join(parts)


def _points(module: Module, plan: Plan) -> list[Candidate]:
    bench = Bench(module, plan.target, plan.recipe, plan.options, "decode", math.inf, whatever_fits=True)
    found = [bench.at(plan.layout, batch) for batch in sorted({*_POINTS, plan.options.batch})]
    return [candidate for candidate in found if candidate is not None]


def _table(plan: Plan) -> str:
    rows = [
        ("tokens/s of a device", [f"{p.per_device:,.4g}" for p in plan.phases.values()]),
        ("tokens/s of a node", [f"{p.per_node:,.0f}" for p in plan.phases.values()]),
        ("step", [f"{p.step_us / 1e3:,.4g} ms" for p in plan.phases.values()]),
        ("two micro-batches", ["yes" if p.overlapped else "no" for p in plan.phases.values()]),
        ("exposed communication", [f"{p.exposed_us / 1e3:,.4g} ms" for p in plan.phases.values()]),
        ("balance of the experts", [f"{p.balance:.2f}" for p in plan.phases.values()]),
        ("attention", [_form(p) for p in plan.phases.values()]),
        ("bound by", [p.bound for p in plan.phases.values()]),
        ("MFU", [f"{p.mfu:.1%}" for p in plan.phases.values()]),
        ("memory", [_memory(p) for p in plan.phases.values()]),
    ]
    head = "".join(f"<th>{name}</th>" for name in ("", *plan.phases))
    body = "".join(f"<tr><td>{name}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>" for name, cells in rows)
    first, then = f"{plan.first_token_ms:,.4g} ms", f"{plan.time_per_token_ms:,.4g} ms"
    return f"<table><tr>{head}</tr>{body}</table><p>First token after {first}, then one every {then}.</p>"


def _form(phase: PhasePlan) -> str:
    crossover = phase.choice.crossover
    if len(phase.choice.times_us) < 2:
        return "keys and values per head"
    return f"{phase.choice.form}, " + ("no crossover" if crossover is None else f"crossover at context {crossover}")


def _memory(phase: PhasePlan) -> str:
    m = phase.memory
    parts = {"weights": m.weights, "cache": m.kv_cache, "activations": m.activations, "buffers": m.buffers}
    text = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items())
    return f"{m.total / 1e9:.1f} of {m.capacity / 1e9:.0f} GB ({text})"


def _advice(module: Module, plan: Plan) -> str:
    items = []
    for phase in plan.phases:
        items += [
            f"<li>{phase}: twice the {key.replace('_', ' ')} {gain[phase]:+.1%}</li>"
            for key, gain in plan.gains.items()
        ]
    for phase, found in alternatives(module, plan).items():
        items += [f"<li>{phase}: {escape(a.change)} {a.gain:+.1%}</li>" for a in found[:3]]
    return f"<h3>What a change would give, in tokens/s</h3><ul>{''.join(items)}</ul>"
