"""Rows of the page's tables: ops of the final module, weights with their programs."""

from __future__ import annotations

import html

from moec.ir import Function, Op, WeightRef
from moec.ir.cost import amount, op_cost
from moec.ir.module import Weight
from moec.ir.printer import print_op
from moec.ir.stats import weight_bytes
from moec.passes.op_times import OpTime

LOW = ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1")


def row(*cells: str, kind: str = "") -> str:
    """One table row of cells that are HTML already."""
    return f"<tr{kind}>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def coloured(line: str) -> str:
    """The line as HTML with quantised types marked."""
    text = html.escape(line)
    for word in LOW:
        text = text.replace(word, f"<mark>{word}</mark>")
    return text


def microseconds(us: float) -> str:
    """`12.3 us`, `4.5 ms` or `1.2 s`."""
    if us < 1e3:
        return f"{us:.1f} us"
    return f"{us / 1e3:.2f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


def op_row(function: Function, op: Op, sizes: dict[str, int], time: OpTime | None) -> str:
    """An op with its types, its predicted time, its counts and where it comes from."""
    operands = ", ".join(f"{_operand(o)}: {o.type}" for o in op.operands)
    results = ", ".join(str(r.type) for r in op.results)
    source = f"{op.loc.file}:{op.loc.line}" if op.loc else ""
    made = ", ".join(op.loc.passes) if op.loc else ""
    cost = op_cost(op, sizes)
    predicted = bound = ""
    if time is not None and time.cost is not None:
        predicted = f"{time.cost.time_us:.1f} × {time.runs}"
        bound = time.cost.bound if time.cost.time_us else "view"
    elif time is not None:
        predicted = "unknown"
        bound = time.why
    text = print_op(op, locations=False).split(" : ")[0]
    counts = [amount(cost.flops, "FLOP"), amount(cost.bytes_read, "B"), amount(cost.bytes_written, "B")]
    return row(*map(coloured, [f"@{function.name}", text, operands, results, predicted, bound, *counts, source, made]))


def _operand(operand: object) -> str:
    return f"@{operand.name}" if isinstance(operand, WeightRef) else f"%{getattr(operand, 'name', '')}"


def weight_row(weight: Weight) -> str:
    """A weight and the steps that make it."""
    program = " → ".join(op.name.removeprefix("weight.") for op in weight.program.ops)
    tensors = ", ".join(str(op.attrs["tensor"]) for op in weight.program.ops if "tensor" in op.attrs)
    total = amount(weight_bytes(weight), "B")
    return row(*map(coloured, [f"@{weight.name}", str(weight.type), str(weight.points()), total, program, tensors]))
