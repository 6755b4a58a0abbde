"""An op of a step as rows of the cost model (`moec cost`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moec.ir import Op, TensorType, WeightRef
from moec.ir.cost import op_cost, phase_sizes
from moec.ir.optable import operand_type

_SURELY_BUSY = 8
"""Pairs an expert at which all experts count as busy; with fewer, how many are busy depends on the routing."""
_STORED = {"fp8_e4m3": "fp8_block", "bf16": "bf16"}
_STREAMS = ("norm", "swiglu", "add", "rope")
"""Ops that read and write rows once, at the speed of memory or of a cache."""


@dataclass(frozen=True)
class Call:
    """One call of a phase: tokens of one sequence, positions in the cache after it, experts of a token."""

    phase: str
    tokens: int
    context: int
    top_k: int


def op_rows(op: Op, call: Call, *, surely: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of the cost model that one run of `op` amounts to; none where the model has no answer.

    `surely`: also none for experts of which nobody knows how many are busy.
    """
    tokens, context = call.tokens, call.context
    decode, top_k = call.phase == "decode", call.top_k
    if op.name == "linear":
        weight = _weight(op, 1)
        if weight is not None and weight.dtype in _STORED and op.attrs.get("out") != "f32":
            n, k = _shape(weight)
            yield {"op": "gemm", "m": tokens, "n": n, "k": k, "dtype": _STORED[weight.dtype]}
    elif op.name == "moe.experts":
        weight = _weight(op, 3)
        if weight is not None and weight.dtype in _STORED:
            experts, hidden, inter = _shape(weight)
            if surely and not decode and tokens * top_k < _SURELY_BUSY * experts:
                return
            row = {"op": "moe_experts", "rows": tokens * top_k, "experts": experts, "hidden": hidden, "inter": inter}
            yield {**row, "dtype": _STORED[weight.dtype], "layout": "masked" if decode else "contiguous"}
    elif op.name == "attn.mla_absorbed":
        query = operand_type(op.operands[0])
        rotary = operand_type(op.operands[1])
        assert isinstance(query, TensorType)
        assert isinstance(rotary, TensorType)
        heads, rank = (int(d) for d in query.shape[1:])  # type: ignore[arg-type]
        row = {"batch": 1, "context": context, "heads": heads, "kv_rank": rank, "rope": int(rotary.shape[-1])}  # type: ignore[arg-type]
        yield {"op": "mla_decode", **row} if decode else {"op": "mla_prefill", "new_tokens": tokens, **row}
    elif op.name == "attn.mla" and not decode:
        query = operand_type(op.operands[0])
        assert isinstance(query, TensorType)
        _, heads, width = (int(d) if isinstance(d, int) else 0 for d in query.shape)
        nope = int(str(op.attrs["nope"]))
        widths = {"nope": nope, "rope": width - nope, "v_head": int(str(op.attrs["v"]))}
        yield {
            "op": "mla_prefill", "form": "plain", "batch": 1, "new_tokens": tokens, "context": context, "heads": heads,
            **widths,
        }  # fmt: skip
    elif op.name.startswith(_STREAMS):
        cost = op_cost(op, phase_sizes(call.phase, 1, context, context))
        yield {"op": "stream", "bytes": cost.bytes_read + cost.bytes_written}


def _weight(op: Op, position: int) -> TensorType | None:
    operand = op.operands[position] if position < len(op.operands) else None
    t = operand.type if isinstance(operand, WeightRef) else None
    return t if isinstance(t, TensorType) else None


def _shape(t: TensorType) -> list[int]:
    return [int(d) for d in t.shape]  # type: ignore[arg-type]
