"""`report.html` of a dump folder: what every pass did, on one page that needs no network."""

from __future__ import annotations

import html
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib.resources import files
from typing import TYPE_CHECKING

from moec.ir import CacheType, Module, Op, TensorType, WeightRef, print_function
from moec.ir.cost import amount, op_cost, phase_sizes
from moec.ir.diff import diff
from moec.ir.module import Function, Weight
from moec.ir.printer import print_op
from moec.ir.stats import bytes_by_storage, weight_bytes

if TYPE_CHECKING:
    from moec.passes.base import Limits
    from moec.passes.manager import Record

UNCHANGED = 2
"""Unchanged lines shown around a change."""
Row = tuple[str, str, str, str]


@dataclass(frozen=True)
class _Step:
    record: Record
    changes: list[str]
    sides: list[tuple[str, list[Row]]]


class Report:
    """Collects the module after each pass; `html` is the page so far."""

    def __init__(self, module: Module, limits: Limits) -> None:
        self._name = module.name
        self._limits = limits
        self._texts: dict[str, list[str]] = {}
        self._last: Module | None = None
        self._types: list[dict[str, int]] = []
        self._steps: list[_Step] = []

    def add(self, module: Module, record: Record | None) -> None:
        """The module as imported (no record), or behind the pass of `record`."""
        from moec.ir.rewrite import clone_module

        texts = _texts(module)
        if record is not None and self._last is not None:
            changes = [str(c) for c in diff(self._last, module)]
            names = dict.fromkeys([*self._texts, *texts])
            sides = [(n, _side_by_side(self._texts.get(n, []), texts.get(n, []))) for n in names]
            self._steps.append(_Step(record, changes, [(n, rows) for n, rows in sides if rows]))
        self._texts, self._last = texts, clone_module(module)
        self._types.append(bytes_by_storage(module))

    def html(self) -> str:
        """The whole page."""
        assert self._last is not None
        parts = {
            "TITLE": html.escape(self._name),
            "FACTS": _facts(self._last),
            "SUMMARY": self._summary(),
            "TYPES": self._type_table(),
            "PASSES": "".join(_pass(i, s) for i, s in enumerate(self._steps, start=1)),
            "GRAPHS": "".join(_graph(f) for f in self._last.functions.values()),
            "SIZES": html.escape(
                f"batch {self._limits.batch}, context {self._limits.context}, chunk {self._limits.chunk}"
            ),
            "OPS": "".join(_op_row(f, op, self._sizes(f)) for f, op in self._last.ops()),
            "WEIGHTS": "".join(_weight_row(w) for w in self._last.weights.values()),
        }
        page = files("moec.passes").joinpath("report.html").read_text()
        for key, text in parts.items():
            page = page.replace("{{" + key + "}}", text)
        return page

    def _sizes(self, function: Function) -> dict[str, int]:
        limits = self._limits
        return phase_sizes(str(function.attrs.get("phase", "")), limits.batch, limits.context, limits.chunk)

    def _summary(self) -> str:
        rows = []
        for i, step in enumerate(self._steps, start=1):
            r = step.record
            notes = "".join(f"<div>{html.escape(n)}</div>" for n in r.notes)
            notes += "".join(f'<div class="warning">warning: {html.escape(w)}</div>' for w in r.warnings)
            cells = [
                str(i),
                f'<a href="#pass{i}">{html.escape(r.name)}</a>',
                f"{r.seconds * 1e3:.1f}",
                f"{r.peak_mb:.0f}",
            ]
            cells += [f"{r.ops_before} → {r.ops_after}", str(len(step.changes)), str(r.matched), notes]
            rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
        return "".join(rows)

    def _type_table(self) -> str:
        """Weight bytes by element type after each pass: the row where a type appears is where it was introduced."""
        kinds = list(dict.fromkeys(k for types in self._types for k in types))
        head = "<tr><th>after</th>" + "".join(f"<th>{html.escape(k)}</th>" for k in kinds) + "</tr>"
        rows, before = [], self._types[0]
        for name, types in zip(["(import)", *(s.record.name for s in self._steps)], self._types, strict=True):
            cells = [
                f"<td{_mark(types.get(k, 0), before.get(k, 0))}>{amount(types[k], 'B') if k in types else '–'}</td>"
                for k in kinds
            ]
            rows.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
            before = types
        return head + "".join(rows)


def _mark(now: int, before: int) -> str:
    return ' class="changed"' if now != before else ""


def _texts(module: Module) -> dict[str, list[str]]:
    out = {f"@{f.name}": print_function(f, locations=False).splitlines() for f in module.functions.values()}
    lines = []
    for w in module.weights.values():
        lines.append(f"weight @{w.name}: {w.type}")
        lines += [f"    {print_op(op, locations=False)}" for op in w.program.ops]
    return {"weight programs": lines, **out}


def _side_by_side(a: list[str], b: list[str]) -> list[Row]:
    """Rows (kind, left, right, how many unchanged lines are left out); empty when the texts are equal."""
    if a == b:
        return []
    rows: list[Row] = []
    for tag, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            rows += _context(a[i:j], first=i == 0, last=j == len(a))
            continue
        left, right = a[i:j], b[k:m]
        for n in range(max(len(left), len(right))):
            rows.append(("change", left[n] if n < len(left) else "", right[n] if n < len(right) else "", ""))
    return rows


def _context(lines: list[str], *, first: bool, last: bool) -> list[Row]:
    head, tail = 0 if first else UNCHANGED, 0 if last else UNCHANGED
    if len(lines) <= head + tail:
        return [("same", line, line, "") for line in lines]
    shown = [("same", line, line, "") for line in lines[:head]]
    left_out = len(lines) - head - tail
    shown.append(("gap", "", "", f"{left_out} unchanged lines"))
    return [*shown, *(("same", line, line, "") for line in lines[len(lines) - tail :])]


def _pass(number: int, step: _Step) -> str:
    r = step.record
    out = [f'<details class="pass" id="pass{number}"><summary><b>{number}. {html.escape(r.name)}</b> '
           f"<span>{len(step.changes)} changes, {r.seconds * 1e3:.1f} ms</span></summary>"]  # fmt: skip
    out += [f'<p class="warning">warning: {html.escape(w)}</p>' for w in r.warnings]
    out += [f"<p>{html.escape(n)}</p>" for n in r.notes]
    if not step.sides:
        out.append("<p>The text did not change.</p>")
    for name, rows in step.sides:
        out.append(f"<h4>{html.escape(name)}</h4><table class=diff><tr><th>before</th><th>after</th></tr>")
        for kind, left, right, gap in rows:
            if kind == "gap":
                out.append(f"<tr class=gap><td colspan=2>{gap}</td></tr>")
            else:
                out.append(f"<tr class={kind}><td>{_colour(left)}</td><td>{_colour(right)}</td></tr>")
        out.append("</table>")
    return "".join([*out, "</details>"])


def _colour(line: str) -> str:
    """The line as HTML with quantised types marked."""
    text = html.escape(line)
    for word in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1"):
        text = text.replace(word, f"<mark>{word}</mark>")
    return text


def _facts(module: Module) -> str:
    attrs = ", ".join(f"{k} = {v}" for k, v in module.attrs.items())
    total = sum(weight_bytes(w) for w in module.weights.values())
    ops = sum(1 for _ in module.ops())
    facts = f"{len(module.functions)} functions, {ops} ops, {len(module.weights)} weights of {amount(total, 'B')}"
    return html.escape(f"{facts}. {attrs}")


def _op_row(function: Function, op: Op, sizes: dict[str, int]) -> str:
    results = ", ".join(str(r.type) for r in op.results)
    operands = ", ".join(f"{_operand(o)}: {o.type}" for o in op.operands)
    cells = [f"@{function.name}", print_op(op, locations=False).split(" : ")[0], operands, results]
    source = f"{op.loc.file}:{op.loc.line}" if op.loc else ""
    made = ", ".join(op.loc.passes) if op.loc else ""
    cost = op_cost(op, sizes)
    counts = [amount(cost.flops, "FLOP"), amount(cost.bytes_read, "B"), amount(cost.bytes_written, "B")]
    return "<tr>" + "".join(f"<td>{_colour(c)}</td>" for c in [*cells, *counts, source, made]) + "</tr>"


def _operand(operand: object) -> str:
    return f"@{operand.name}" if isinstance(operand, WeightRef) else f"%{getattr(operand, 'name', '')}"


def _weight_row(weight: Weight) -> str:
    program = " → ".join(op.name.removeprefix("weight.") for op in weight.program.ops)
    tensors = ", ".join(str(op.attrs["tensor"]) for op in weight.program.ops if "tensor" in op.attrs)
    cells = [
        f"@{weight.name}",
        str(weight.type),
        str(weight.points()),
        amount(weight_bytes(weight), "B"),
        program,
        tensors,
    ]
    return "<tr>" + "".join(f"<td>{_colour(c)}</td>" for c in cells) + "</tr>"


BOX_WIDTH, BOX_HEIGHT, GAP = 250, 30, 14


def _graph(function: Function) -> str:
    """A picture of the function: ops in rows by their longest path from the arguments."""
    producer = function.producer()
    depth: dict[int, int] = {}
    rows: dict[int, list[Op]] = {}
    for op in function.ops:
        feeders = [producer[v] for v in op.values() if v in producer]
        level = max((depth[id(f)] + 1 for f in feeders), default=0)
        depth[id(op)] = level
        rows.setdefault(level, []).append(op)
    place = {id(op): (i * (BOX_WIDTH + GAP) + GAP, level * (BOX_HEIGHT + 2 * GAP) + GAP)
             for level, ops in rows.items() for i, op in enumerate(ops)}  # fmt: skip
    lines, boxes = [], []
    for op in function.ops:
        x, y = place[id(op)]
        for feeder in {id(producer[v]): None for v in op.values() if v in producer}:
            fx, fy = place[feeder]
            lines.append(f'<line x1="{fx + BOX_WIDTH / 2}" y1="{fy + BOX_HEIGHT}" x2="{x + BOX_WIDTH / 2}" y2="{y}"/>')
        type_ = op.results[0].type if op.results else None
        shown = str(type_) if isinstance(type_, TensorType | CacheType) else ""
        low = any("fp8" in str(o.type) or "fp4" in str(o.type) for o in op.operands)
        boxes.append(
            f'<g><rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="4"{" class=low" if low else ""}>'
            f"<title>{html.escape(print_op(op))}</title></rect>"
            f'<text x="{x + 8}" y="{y + 13}">{html.escape(op.name)}</text>'
            f'<text x="{x + 8}" y="{y + 25}" class="type">{html.escape(shown)}</text></g>'
        )
    width = max((len(ops) for ops in rows.values()), default=1) * (BOX_WIDTH + GAP) + GAP
    height = len(rows) * (BOX_HEIGHT + 2 * GAP) + GAP
    picture = (
        f'<svg width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg">{"".join(lines + boxes)}</svg>'
    )
    summary = f"@{html.escape(function.name)} <span>{len(function.ops)} ops</span>"
    return f"<details><summary>{summary}</summary>{picture}</details>"
