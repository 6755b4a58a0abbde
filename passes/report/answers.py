"""What a reader wants to know first: where low precision came in, what it costs and saves, where the time goes."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moec.ir import Module, TensorType
from moec.ir.cost import amount
from moec.ir.stats import weight_bytes
from moec.passes.op_times import OpTime, step_us
from moec.passes.planning.stated import LOW
from moec.passes.report.tables import microseconds, row

MOST = 7
"""Ops shown of those that take the most time."""
NAMES = {"fp8_e4m3": "FP8 (E4M3)", "fp8_e5m2": "FP8 (E5M2)", "fp4_e2m1": "FP4 (E2M1)", "i8": "INT8"}
BITS = {"fp8_e4m3": 4, "fp8_e5m2": 3, "fp4_e2m1": 2, "i8": 7}
"""Significant bits of a normal number of each format, the leading one included."""


@dataclass(frozen=True)
class State:
    """A module between two passes, in numbers: bytes of weights by type, predicted times of its ops and steps."""

    low_bytes: dict[str, int]
    other_bytes: int
    low_weights: list[str]
    other_weights: list[str]
    casts: int
    low_ops: int
    ops: int
    times: list[OpTime]
    steps: dict[str, tuple[float, float]]
    """Microseconds of a step of each phase: as scheduled, and its ops one after the other."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.low_bytes.values()) + self.other_bytes

    def step_us(self, phase: str) -> float:
        """Microseconds of a step of a phase, with the schedule where there is one."""
        return self.steps.get(phase, (0.0, 0.0))[0]

    @property
    def phases(self) -> list[str]:
        """Phases that the module has."""
        return list(self.steps)


def state_of(module: Module, times: list[OpTime]) -> State:
    """Count a module."""
    low: Counter[str] = Counter()
    other = 0
    low_weights, other_weights = [], []
    for weight in module.weights.values():
        assert isinstance(weight.type, TensorType)
        if weight.type.dtype in LOW:
            low[weight.type.dtype] += weight_bytes(weight)
            low_weights.append(weight.name)
        else:
            other_weights.append(weight.name)
            other += weight_bytes(weight)
    casts = sum(op.name == "quant.cast" for _, op in module.ops())
    low_ops = sum(
        any(isinstance(t, TensorType) and t.dtype in LOW for t in (o.type for o in op.operands))
        for _, op in module.ops()
    )
    steps = {phase: step_us(module, times, phase) for phase in dict.fromkeys(t.phase for t in times)}
    ops = sum(1 for _ in module.ops())
    return State(dict(low), other, low_weights, other_weights, casts, low_ops, ops, times, steps)


def answers(states: Sequence[tuple[str, State]], moved: Sequence[float | None], where: str) -> str:
    """The answers as HTML; `states` are the import's and each pass's, `moved` the measured change of results."""
    out = [_introduced(states, moved)]
    last = states[-1][1]
    out += [_slowest(last, phase, where, _scheduler(states, phase)) for phase in last.phases]
    return "".join(out)


def _introduced(states: Sequence[tuple[str, State]], moved: Sequence[float | None]) -> str:
    found = []
    for number, (name, now) in enumerate(states[1:], start=1):
        before = states[number - 1][1]
        if set(now.low_bytes) - set(before.low_bytes) or (now.casts and not before.casts):
            found.append(_introduction(number, name, before, now, moved[number]))
    if not found:
        low = states[0][1].low_bytes
        text = "came with the checkpoint" if low else "is not used: every weight has 16 bits or more"
        return f"<h3>Low precision {text}.</h3>"
    return "".join(found)


def _introduction(number: int, name: str, before: State, now: State, moved: float | None) -> str:
    kinds = [k for k in now.low_bytes if k not in before.low_bytes] or list(now.low_bytes)
    formats = " and ".join(NAMES[k] for k in kinds)
    link = _link(number, name)
    weights = len(now.low_weights) + len(now.other_weights)
    stored = f"{len(now.low_weights)} of {weights} weights are stored in it"
    bits = min((BITS[k] for k in kinds), default=0)
    if moved is not None:
        changed = f"results moved by {moved:.2g} (relative, measured in float64 on a small instance)"
    else:
        changed = (
            "not measured in this run (<code>--verify numerics</code> does, up to 40 M parameters); "
            f"an element is rounded by at most {2.0**-bits:.2%}"
        )
    rows = [
        row("weights", amount(before.weight_bytes, "B"), amount(now.weight_bytes, "B"), _ratio(before, now)),
        *(
            row(
                f"one step of {html.escape(p)}",
                microseconds(before.step_us(p)),
                microseconds(now.step_us(p)),
                _change(before.step_us(p), now.step_us(p)),
            )
            for p in now.phases
        ),
    ]
    for p in now.phases:
        casts = sum(t.step_us for t in now.times if t.phase == p and t.op.name == "quant.cast")
        total = now.step_us(p)
        if casts:
            share = f"{casts / total:.1%} of the step" if total else ""
            rows.append(row(f"… of it quantising activations, {html.escape(p)}", "–", microseconds(casts), share))
    rows.append(row("accuracy", "–", changed, ""))
    low, other = (f"<code>{html.escape(_short(names))}</code>" for names in (now.low_weights, now.other_weights))
    return (
        f"<h3>{formats} came in with {link}: {stored}, {now.low_ops} ops read it, {now.casts} casts were added.</h3>"
        f'<table class="narrow"><tr><th>what it costs and saves</th><th>before</th><th>after</th><th>change</th></tr>'
        f"{''.join(rows)}</table>"
        f"<p class='lead'>Stored in {formats}: {low}.<br>Kept in 16 bits or more: {other}.</p>"
    )


def _short(weights: Sequence[str]) -> str:
    """Names of weights without the stack of layers that they belong to, each once."""
    return ", ".join(dict.fromkeys(name.split(".", 1)[-1] for name in weights))


def _ratio(before: State, now: State) -> str:
    return _change(before.weight_bytes, now.weight_bytes)


def _change(before: float, now: float) -> str:
    return f"{now / before - 1:+.0%}" if before else ""


def _link(number: int, name: str) -> str:
    return f'<a href="#pass{number}">pass {number}, {html.escape(name)}</a>'


def _scheduler(states: Sequence[tuple[str, State]], phase: str) -> str:
    """A link to the pass that hid exchanges in a phase; empty where none did."""
    for number, (name, state) in enumerate(states):
        scheduled, serial = state.steps.get(phase, (0.0, 0.0))
        if scheduled < serial:
            return _link(number, name)
    return ""


def _slowest(state: State, phase: str, where: str, scheduler: str) -> str:
    """The ops that take the most of a step, equal ops of a function together; `scheduler` hid exchanges, if any."""
    scheduled, total = state.steps[phase]
    if not total:
        return ""
    sums: Counter[tuple[str, str, str]] = Counter()
    for t in state.times:
        weights = [o.name.rsplit(".", 1)[-1] for o in t.op.operands if hasattr(o, "indices")]
        sums[t.function, t.op.name, weights[0] if weights else ""] += t.step_us if t.phase == phase else 0  # type: ignore[assignment]
    rows = []
    for (function, op, weight), us in sums.most_common(MOST):
        share = us / total
        bar = f'<div class="bar" style="width:{100 * share:.1f}%"></div>'
        rows.append(
            row(
                f"<code>{html.escape(f'{op} {weight}')}</code>",
                f"@{html.escape(function)}",
                microseconds(us),
                f"{share:.0%}{bar}",
            )
        )
    unknown = sum(t.cost is None for t in state.times if t.phase == phase)
    if scheduler:
        how = (
            f"with exchanges hidden as {scheduler} found; one op after the other it would be {microseconds(total)}, "
            "which the shares are of"
        )
    else:
        how = "op after op"
    note = f" {unknown} ops have no prediction and count as nothing." if unknown else ""
    return (
        f"<h3>One step of {html.escape(phase)} takes {microseconds(scheduled)} on one device of {html.escape(where)}, "
        f"most of it here.</h3><p class='lead'>Predicted by the cost model, {how}.{note}</p>"
        f'<table class="narrow"><tr><th>op</th><th>in</th><th>time, all runs</th><th class="share">share</th></tr>'
        f"{''.join(rows)}</table>"
    )
