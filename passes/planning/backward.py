"""What the backward pass of a step costs, row by row of the forward one.

Every product has two more: of the gradient with the weight (towards the input), and of the input with the gradient
(towards the weight), whose operands are quantised along tokens first and whose result is added to FP32 gradients.
Norms and the up-projections in front of attention are computed again rather than stored (DeepSeek-V3 technical report,
arXiv 2412.19437, sec. 3.2.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moec.ir import Module
from moec.passes.planning.rows import COMMUNICATION, Row
from moec.passes.planning.sharding import before_attention
from moec.passes.planning.timing import Line

ATTENTION_WORK = 2.5
"""Products of attention's backward over those of its forward: five against two (FlashAttention-2, arXiv 2307.08691)."""

ATTENTION_RATE = 0.83
"""Rate of attention's backward over that of its forward: assumed, of the order of FlashAttention-3's published curves
(arXiv 2407.08608, Figures 5 and 6)."""

STREAM_WORK = 1.5
"""Traffic of a memory-bound backward over its forward: the gradient is read too."""

_UNTRAINED = ("cache.append", "cache.append_index", "cache.read")


@dataclass(frozen=True)
class Pass:
    """The lines of a forward, of the backward towards inputs (exchanges and recomputation included), and towards
    weights."""

    forward: list[Line]
    inputs: list[Line]
    weights: list[Line]


def training_pass(module: Module, forward: Sequence[Line], tokens: int) -> Pass:
    """The three parts of a micro-batch of `tokens` tokens; `forward` are its lines as for a prefill step.

    A prefill computes the head for the last tokens only; here it is computed for all, with the loss.
    """
    again = before_attention(module)
    trained = [_whole_head(line, tokens) for line in forward if not line.label.endswith(_UNTRAINED)]
    inputs: list[Line] = []
    weights: list[Line] = []
    for line in trained:
        if line.row["op"] == "gemm" and line.label in again:
            inputs.append(line)
        if line.row["op"] == "stream" and "norm" in line.label:
            inputs.append(line)
        inputs += [replace(line, row=row, calls=calls) for row, calls in _inputs(line)]
        weights += [replace(line, row=row) for row in _weights(line.row)]
    return Pass(trained, inputs, weights)


def _whole_head(line: Line, tokens: int) -> Line:
    row = line.row
    return replace(line, row={**row, "m": tokens}) if line.label == "head" and row["op"] == "gemm" else line


def _inputs(line: Line) -> Iterator[tuple[Row, float]]:
    """Rows towards the inputs, with how often each is called."""
    row, calls = line.row, line.calls
    if row["op"] == "gemm":
        yield {**row, "n": row["k"], "k": row["n"], **_quantised(row)}, calls
    elif row["op"] == "grouped_gemm":
        yield {**row, "n": row["k"], "k": row["n"]}, calls
    elif row["op"].startswith("mla_"):
        yield row, calls * ATTENTION_WORK / ATTENTION_RATE
    elif row["op"] == "stream":
        yield {**row, "bytes": round(row["bytes"] * STREAM_WORK)}, calls
    elif row["op"] == "router":
        yield row, 2 * calls
    else:
        # Experts do the same three products the other way round; the gradient of a dispatch is a combine.
        assert row["op"] == "moe_experts" or row["op"] in COMMUNICATION, row["op"]
        yield row, calls


def _quantised(row: Row) -> dict[str, bool]:
    return {"quantise_a": True} if row["dtype"] != "bf16" else {}


def _weights(row: Row) -> Iterator[Row]:
    if row["op"] == "gemm":
        m, n, k = row["m"], row["n"], row["k"]
        yield {"op": "gemm", "m": n, "n": k, "k": m, "dtype": row["dtype"]}
        yield from _around(row["dtype"], m, n + k, n * k)
    elif row["op"] == "grouped_gemm":
        n, k, groups = row["n"], row["k"], row["groups"]
        yield {**row, "m_per_group": n, "n": k, "k": row["m_per_group"]}
        yield from _around(row["dtype"], row["m_per_group"] * groups, n + k, groups * n * k)
    elif row["op"] == "moe_experts":
        rows, experts, hidden, inter = row["rows"], row["experts"], row["hidden"], row["inter"]
        each = max(1, rows // experts)
        for out, width in ((2 * inter, hidden), (hidden, inter)):
            shape = {"groups": experts, "m_per_group": out, "n": width, "k": each}
            yield {"op": "grouped_gemm", **shape, "dtype": row["dtype"], "layout": "contiguous"}
        yield from _around(row["dtype"], rows, 2 * hidden + 3 * inter, 3 * experts * hidden * inter)


def _around(dtype: str, rows: int, columns: int, elements: int) -> Iterator[Row]:
    """Quantisation of both operands along tokens, and the sum into FP32 gradients: read and written."""
    if dtype != "bf16":
        yield {"op": "quantise", "rows": rows, "columns": columns}
    yield {"op": "stream", "bytes": 8 * elements}
