"""Profiled ops as rows of the cost model, to calibrate this machine's target with (`moec targets calibrate`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moec.ir import Module, Op, TensorType, WeightRef, parse_module
from moec.ir.cost import op_cost, phase_sizes
from moec.ir.optable import operand_type
from moec.profile.run import OpTime, Profile, profile
from moec.runtime import Model

_PROMPTS = (4, 32, 128)
_CONTEXTS = (16, 8, 4, 2, 1)
"""Parts of the compiled context that decode is timed at."""
_SURELY_BUSY = 8
"""Pairs an expert at which all experts count as busy; with fewer, how many are busy depends on the routing."""
_STORED = {"fp8_e4m3": "fp8_block", "bf16": "bf16"}


def calibration_rows(model: Model, repeat: int = 8) -> list[dict[str, Any]]:
    """Rows of `moec cost` with `time_us` of one call: decode at several contexts, prefills of several sizes. Ops whose
    weights have no type of the cost model are left out, and experts where nobody knows how many are busy.

    Raises NoProfile.
    """
    path = model.artifact.path / "program.ir"
    module = parse_module(path.read_text(), str(path))
    found: list[dict[str, Any]] = []
    for context in sorted({max(1, (model.context - repeat - 4) // part) for part in _CONTEXTS}):
        found += rows_of(module, profile(model, "decode", context, repeat))
    chunk = int(model.artifact.manifest.chunk)
    for tokens in sorted({min(n, chunk, model.context) for n in _PROMPTS}):
        found += rows_of(module, profile(model, "prefill", tokens, repeat))
    return found


def rows_of(module: Module, measured: Profile) -> list[dict[str, Any]]:
    """The rows of one profile."""
    top_k = next((op.attrs["top_k"] for _, op in module.ops() if op.name == "moe.route"), 1)
    return [
        {**row, "time_us": time.us / time.calls}
        for time in measured.ops
        if time.us > 0
        for row in _row(module, time, measured, int(top_k))  # type: ignore[arg-type]
    ]


def _row(module: Module, time: OpTime, measured: Profile, top_k: int) -> Iterator[dict[str, Any]]:
    op = module.functions[time.function].ops[time.op]
    tokens, context = measured.tokens, measured.context
    decode = measured.phase == "decode"
    if op.name == "linear":
        weight = _weight(op, 1)
        if weight is not None and weight.dtype in _STORED and op.attrs.get("out") != "f32":
            n, k = _shape(weight)
            yield {"op": "gemm", "m": tokens, "n": n, "k": k, "dtype": _STORED[weight.dtype]}
    elif op.name == "moe.experts":
        weight = _weight(op, 3)
        if weight is not None and weight.dtype in _STORED:
            experts, hidden, inter = _shape(weight)
            if not decode and tokens * top_k < _SURELY_BUSY * experts:
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
    elif op.name.startswith(("norm", "swiglu", "add", "rope")):
        cost = op_cost(op, phase_sizes(measured.phase, 1, context, context))
        yield {"op": "stream", "bytes": cost.bytes_read + cost.bytes_written}


def _weight(op: Op, position: int) -> TensorType | None:
    operand = op.operands[position] if position < len(op.operands) else None
    t = operand.type if isinstance(operand, WeightRef) else None
    return t if isinstance(t, TensorType) else None


def _shape(t: TensorType) -> list[int]:
    return [int(d) for d in t.shape]  # type: ignore[arg-type]
