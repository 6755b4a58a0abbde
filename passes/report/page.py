"""The page: collects the module behind every pass, and writes what is known so far."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from moec.ir import Module, print_function
from moec.ir.cost import amount, phase_sizes
from moec.ir.diff import diff
from moec.ir.mesh import mesh_of
from moec.ir.module import Function, Op
from moec.ir.printer import print_op
from moec.ir.stats import bytes_by_storage, weight_bytes
from moec.passes.op_times import OpTime, op_times
from moec.passes.report.answers import State, answers, state_of
from moec.passes.report.graph import picture
from moec.passes.report.sides import Row, side_by_side
from moec.passes.report.tables import coloured, microseconds, op_row, row, weight_row

if TYPE_CHECKING:
    from moec.passes.base import Context
    from moec.passes.manager import Record


@dataclass(frozen=True)
class _Step:
    record: Record
    changes: list[str]
    sides: list[tuple[str, list[Row]]]


class Report:
    """Collects the module after each pass; `html` is the page so far."""

    def __init__(self, module: Module, context: Context) -> None:
        self._name = module.name
        self._context = context
        self._texts: dict[str, list[str]] = {}
        self._last: Module | None = None
        self._types: list[dict[str, int]] = []
        self._states: list[State] = []
        self._steps: list[_Step] = []

    def add(self, module: Module, record: Record | None) -> None:
        """The module as imported (no record), or behind the pass of `record`."""
        from moec.ir.rewrite import clone_module

        texts = _texts(module)
        if record is not None and self._last is not None:
            changes = [str(c) for c in diff(self._last, module)]
            names = dict.fromkeys([*self._texts, *texts])
            sides = [(n, side_by_side(self._texts.get(n, []), texts.get(n, []))) for n in names]
            self._steps.append(_Step(record, changes, [(n, rows) for n, rows in sides if rows]))
        self._texts, self._last = texts, clone_module(module)
        self._types.append(bytes_by_storage(module))
        self._states.append(state_of(self._last, op_times(self._last, self._context)))

    def html(self) -> str:
        """The whole page."""
        assert self._last is not None
        limits, target = self._context.limits, self._context.target.name
        names = ["(import)", *(s.record.name for s in self._steps)]
        moved = [None, *(s.record.moved for s in self._steps)]
        times = {t.op: t for t in self._states[-1].times}
        parts = {
            "TITLE": html.escape(self._name),
            "FACTS": self._facts(self._last),
            "ANSWERS": answers(list(zip(names, self._states, strict=True)), moved, target),
            "SUMMARY": self._summary(),
            "TYPES": self._type_table(),
            "PASSES": "".join(_pass(i, s) for i, s in enumerate(self._steps, start=1)),
            "GRAPHS": "".join(_graph(f, times) for f in reversed(self._last.functions.values())),
            "SIZES": html.escape(f"batch {limits.batch}, context {limits.context}, chunk {limits.chunk} on {target}"),
            "OPS": "".join(op_row(f, op, self._sizes(f), times.get(op)) for f, op in self._last.ops()),
            "WEIGHTS": "".join(weight_row(w) for w in self._last.weights.values()),
        }
        page = files("moec.passes.report").joinpath("page.html").read_text(encoding="utf-8")
        for key, text in parts.items():
            page = page.replace("{{" + key + "}}", text)
        return page

    def _sizes(self, function: Function) -> dict[str, int]:
        limits = self._context.limits
        parts = int(str(function.attrs.get("micro_batches", 1)))
        return phase_sizes(str(function.attrs.get("phase", "")), limits.batch, limits.context, limits.chunk, parts)

    def _facts(self, module: Module) -> str:
        total = sum(weight_bytes(w) for w in module.weights.values())
        ops = sum(1 for _ in module.ops())
        sizes, ranks = self._context.limits, mesh_of(module).ranks
        on = f" on each of {ranks} devices" if ranks > 1 else ""
        facts = [
            f"Compiled for {self._context.target.name}, batch {sizes.batch}, context {sizes.context}, "
            f"prefill chunks of {sizes.chunk} tokens.",
            f"{len(module.functions)} functions with {ops} ops (a layer function stands for all its layers), "
            f"{len(module.weights)} weights of {amount(total, 'B')}{on}.",
        ]
        shown = ", ".join(f"{k} = {v}" for k, v in module.attrs.items() if k != "target")
        return html.escape(" ".join(facts) + (f" Module attributes: {shown}." if shown else ""))

    def _summary(self) -> str:
        phases = self._states[0].phases
        head = ["#", "pass", "ran for", "peak memory", "ops", "changes", "matches", "weights"]
        head += [f"step of {p}" for p in phases] + ["what it did"]
        rows = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
        first = self._states[0]
        rows.append(
            row("0", "(import)", "", "", str(first.ops), "", "", amount(first.weight_bytes, "B"),
                *(microseconds(first.step_us(p)) for p in phases), "")
        )  # fmt: skip
        for i, step in enumerate(self._steps, start=1):
            r, before, now = step.record, self._states[i - 1], self._states[i]
            notes = [f"<div>{html.escape(n)}</div>" for n in r.notes]
            if r.moved is not None:
                notes.append(f"<div>results moved by {r.moved:.2g} (relative)</div>")
            notes += [f'<div class="warning">warning: {html.escape(w)}</div>' for w in r.warnings]
            cells = [
                str(i),
                f'<a href="#pass{i}">{html.escape(r.name)}</a>',
                f"{r.seconds * 1e3:.1f} ms",
                f"{r.peak_mb:.0f} MB",
                f"{r.ops_before} → {r.ops_after}",
                str(len(step.changes)),
                str(r.matched),
                _marked(amount(now.weight_bytes, "B"), amount(before.weight_bytes, "B")),
                *(_marked(microseconds(now.step_us(p)), microseconds(before.step_us(p))) for p in phases),
                "".join(notes),
            ]
            rows.append(row(*cells))
        return "".join(rows)

    def _type_table(self) -> str:
        """Weight bytes by element type after each pass: the row where a type appears is where it was introduced."""
        kinds = list(dict.fromkeys(k for types in self._types for k in types))
        head = "<tr><th>after</th>" + "".join(f"<th>{html.escape(k)}</th>" for k in kinds) + "</tr>"
        rows, before = [], self._types[0]
        for name, types in zip(["(import)", *(s.record.name for s in self._steps)], self._types, strict=True):
            cells = [
                f"<td{' class=changed' if types.get(k, 0) != before.get(k, 0) else ''}>"
                f"{amount(types[k], 'B') if k in types else '–'}</td>"
                for k in kinds
            ]
            rows.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
            before = types
        return head + "".join(rows)


def _marked(now: str, before: str) -> str:
    return now if now == before else f'<span class="changed">{now}</span>'


def _texts(module: Module) -> dict[str, list[str]]:
    out = {f"@{f.name}": print_function(f, locations=False).splitlines() for f in module.functions.values()}
    lines = []
    for w in module.weights.values():
        lines.append(f"weight @{w.name}: {w.type}")
        lines += [f"    {print_op(op, locations=False)}" for op in w.program.ops]
    return {"weight programs": lines, **out}


def _figure(svg: str) -> str:
    """A picture of a pass, as an image of its own."""
    return f'<img alt="plot" src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">'


def _pass(number: int, step: _Step) -> str:
    r = step.record
    out = [f'<details class="pass" id="pass{number}"><summary><b>{number}. {html.escape(r.name)}</b> '
           f"<span>{len(step.changes)} changes, {r.seconds * 1e3:.1f} ms</span></summary>"]  # fmt: skip
    out += [f'<p class="warning">warning: {html.escape(w)}</p>' for w in r.warnings]
    out += [f"<p>{html.escape(n)}</p>" for n in [*r.notes, *r.details]]
    out += [_figure(svg) for svg in r.figures]
    if not step.sides:
        out.append("<p>The text did not change.</p>")
    for name, rows in step.sides:
        out.append(f"<h4>{html.escape(name)}</h4><table class=diff><tr><th>before</th><th>after</th></tr>")
        for kind, left, right, gap in rows:
            if kind == "gap":
                out.append(f"<tr class=gap><td colspan=2>{gap}</td></tr>")
            else:
                out.append(f"<tr class={kind}><td>{coloured(left)}</td><td>{coloured(right)}</td></tr>")
        out.append("</table>")
    return "".join([*out, "</details>"])


def _graph(function: Function, times: dict[Op, OpTime]) -> str:
    """A picture of the function; those of layers stand open."""
    known = {op: times[op].cost.time_us for op in function.ops if op in times and times[op].cost}  # type: ignore[union-attr]
    layers = max((times[op].runs for op in known), default=1)
    total = sum(known.values())
    runs = f"a layer, {layers} layers" if layers > 1 else "a run"
    interval = function.attrs.get("interval_us")
    every = f"; as scheduled one every {microseconds(interval)}" if isinstance(interval, float) else ""
    facts = f"{len(function.ops)} ops, {microseconds(total)} {runs}{every}" if known else ""
    opened = " open" if layers > 1 else ""
    summary = f"@{html.escape(function.name)} <span>{facts}</span>"
    drawn = picture(function, known, total)
    return f'<details class="graph"{opened}><summary>{summary}</summary><div class="scroll">{drawn}</div></details>'
