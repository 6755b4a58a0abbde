"""Profiled ops as rows of the cost model, to calibrate this machine's target with (`moec targets calibrate`)."""

from __future__ import annotations

from typing import Any

from moec.ir import Module, parse_module
from moec.profile.op_rows import op_rows
from moec.profile.run import Profile, call_of, profile
from moec.runtime import Model

_PROMPTS = (4, 32, 128)
_CONTEXTS = (16, 8, 4, 2, 1)
"""Parts of the compiled context that decode is timed at."""


def calibration_rows(model: Model, repeat: int = 8) -> list[dict[str, Any]]:
    """Rows of `moec cost` with `time_us` of one call: decode at several contexts, prefills of several sizes. Ops whose
    weights have no type of the cost model are left out, and experts where nobody knows how many are busy.

    Raises NoProfile.
    """
    path = model.artifact.path / "program.ir"
    module = parse_module(path.read_text(encoding="utf-8"), str(path))
    found: list[dict[str, Any]] = []
    for context in sorted({max(1, (model.context - repeat - 4) // part) for part in _CONTEXTS}):
        found += rows_of(module, profile(model, "decode", context, repeat))
    chunk = int(model.artifact.manifest.chunk)
    for tokens in sorted({min(n, chunk, model.context) for n in _PROMPTS}):
        found += rows_of(module, profile(model, "prefill", tokens, repeat))
    return found


def rows_of(module: Module, measured: Profile) -> list[dict[str, Any]]:
    """The rows of one profile."""
    call = call_of(module, measured.phase, measured.tokens, measured.context)
    return [
        {**row, "time_us": time.us / time.calls}
        for time in measured.ops
        if time.us > 0
        for row in op_rows(module.functions[time.function].ops[time.op], call)
    ]
