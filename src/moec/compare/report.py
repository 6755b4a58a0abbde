"""A comparison as a few lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from moec.compare.result import Comparison, OpError

_SHOWN = 4
"""Departing ops after the first, and weights of one op, that are listed."""


def report(found: Comparison) -> Iterator[str]:
    """The lines that `moec run --compare` prints."""
    worst = found.worst
    yield f"compared  {len(found.ops)} ops of {found.tokens} tokens; errors in standard deviations of the reference"
    yield f"worst op  {worst.error:.1e} (bound {found.bound:.0e}), {_place(worst)}: {worst.op.partition(' {')[0]}"
    yield f"routing   {found.near_ties} near ties"
    yield f"logits    {found.logits_error:.1e} from the reference run from end to end"
    if found.transformers_error is not None:
        yield f"          {found.transformers_error:.1e} from transformers in FP32"
    if found.departures:
        yield from _departures(found)
    if found.artifact_error > found.bound:
        yield f"departs   the artifact's own kernels, by {found.artifact_error:.1e}, from its program compiled anew"
    if found.agrees:
        yield "agrees    every op is within its bound"


def _departures(found: Comparison) -> Iterator[str]:
    first, *others = found.departures
    yield f"departs   {_place(first)}, by {first.error:.1e}"
    yield f"          {first.op}"
    yield f"          from {' -> '.join(first.location) or 'an unknown place'}"
    if first.rerouted:
        yield f"          {first.rerouted} of {found.tokens} tokens go to other experts"
    if first.weights:
        yield f"          stored otherwise than in the folder: {_some(first.weights)}"
    else:
        yield "          its weights are those of the folder: its kernel computes something else"
    if others:
        yield f"          {len(others)} later ops depart too: {_some([f'{_place(o)} {_name(o)}' for o in others])}"


def _place(op: OpError) -> str:
    return f"@{op.function}" if op.layer is None else f"@{op.function}, layer {op.layer}"


def _name(op: OpError) -> str:
    """`%7 = rope` of the whole op."""
    head, _, rest = op.op.partition(" = ")
    return f"{head} = {rest.split(' ', 1)[0]}"


def _some(items: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
