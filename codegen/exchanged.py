"""How much ranks exchange at most: the greatest values of sharding's symbols."""

from __future__ import annotations

from moec.ir import Module, TensorType
from moec.ir.mesh import mesh_of


def comm_bounds(module: Module, max_tokens: int) -> dict[str, int]:
    """Greatest values of sharding's symbols: U tokens of a rank's part, D rows that arrive, G rows of one slot.

    Micro-batches of at most `max_tokens` each have symbols of their own: U0, D0, U1, D1, ...
    """
    tp = mesh_of(module).tp
    part = -(-max_tokens // tp)
    out = {"U": part, "D": 1, "G": 1}
    for _, op in module.ops():
        if op.name == "comm.rows":
            out[str(op.attrs["rows"])] = part
        if op.name == "comm.dispatch":
            ids, ranks = op.operands[2].type, int(op.attrs["ranks"])  # type: ignore[arg-type]
            assert isinstance(ids, TensorType)
            tokens, rows = part if str(ids.shape[0]).startswith("U") else max_tokens, str(op.attrs["rows"])
            local = int(op.attrs["slots"]) // ranks  # type: ignore[arg-type]
            out["G"] = max(out["G"], tokens * ranks)
            arriving = tokens * ranks * min(int(ids.shape[1]), local)  # type: ignore[arg-type]
            out[rows] = max(out.get(rows, 1), arriving)
    return out
