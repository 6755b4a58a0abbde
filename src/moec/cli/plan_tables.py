"""What `moec plan` prints: one plan in detail, or several side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.figures import figures

if TYPE_CHECKING:
    from moec.passes.planning import Alternative, Layout, PhasePlan, Plan

    Better = dict[str, list[Alternative]]

_SHOWN = 12
_WORTH = 0.005


def print_plans(model: str, plans: list[Plan], better: Better, phases: tuple[str, ...]) -> None:
    """One plan in detail with the layouts that beat its own, several side by side; only the phases asked for."""
    if len(plans) == 1:
        _details(model, plans[0], better, phases)
    else:
        _side_by_side(model, plans, phases)


def _details(model: str, plan: Plan, better: Better, phases: tuple[str, ...]) -> None:
    options = plan.options
    print(f"{model} on {plan.target.name}: {layout_text(plan.layout)}, recipe {plan.recipe.name}")
    for line in plan.notes:
        print(f"  note: {line}")
    for phase in (plan.phases[name] for name in phases):
        work = f"{options.batch} requests at context {options.context}"
        if phase.phase == "prefill":
            work = f"{phase.tokens} tokens in prompts of {options.prompt}"
        print(f"\n{phase.phase}: {work} per replica; {_rates(phase)}")
        for line in (_times(phase), _balance(phase), _form(phase), _bounds(phase), _memory(phase)):
            if line:
                print(f"  {line}")
        _ops(phase)
    print(f"\nfirst token after {figures(plan.first_token_ms)} ms, then one every {figures(plan.time_per_token_ms)} ms")
    for line in advice(plan, better, phases):
        print(line)


def layout_text(layout: Layout) -> str:
    """Degrees of parallelism and expert slots in one line."""
    text = f"{layout.ranks} {'rank' if layout.ranks == 1 else 'ranks'}, TP {layout.tp}, DP {layout.dp}"
    if layout.pp > 1:
        text += f", PP {layout.pp}"
    if layout.experts:
        text += f", EP {layout.ep} ({layout.slots_per_device} of {layout.slots} experts a device)"
    return text


def _rates(phase: PhasePlan) -> str:
    node = f", {phase.per_node:,.0f} a node" if phase.layout.ranks > 1 else ""
    return f"{figures(phase.per_device)} tokens/s a device{node}, MFU {phase.mfu:.1%}"


def _times(phase: PhasePlan) -> str:
    text = f"step {figures(phase.step_us / 1e3)} ms: one after the other {figures(phase.serial_us / 1e3)} ms"
    if phase.choice.cost.communication_us:
        text += f" (communication {figures(phase.choice.cost.communication_us / 1e3)} ms)"
    if phase.paired_us is not None:
        verdict = "taken" if phase.overlapped else "not taken"
        text += f", two overlapping micro-batches {figures(phase.paired_us / 1e3)} ms ({verdict})"
    return text


def _balance(phase: PhasePlan) -> str:
    if phase.layout.ep == 1:
        return ""
    return f"the busiest device receives {1 / phase.balance:.2f} times the mean (balance {phase.balance:.2f})"


def _form(phase: PhasePlan) -> str:
    if len(phase.choice.times_us) < 2:
        return "attention caches keys and values per head: there is no latent to absorb"
    times = ", ".join(f"{form} {figures(time / 1e3)} ms" for form, time in phase.choice.times_us.items())
    crossover = phase.choice.crossover
    flips = "no crossover up to the model's limit" if crossover is None else f"crossover at context {crossover}"
    return f"attention {phase.choice.form} ({times}); {flips}"


def _bounds(phase: PhasePlan) -> str:
    parts = sorted(phase.by_bound.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name} {figures(time / 1e3)} ms" for name, time in parts if time)
    return f"bound by {phase.bound} ({text})"


def advice(plan: Plan, better: Better, phases: tuple[str, ...]) -> list[str]:
    """For each phase the change of hardware and of layout that would help most."""
    found = []
    for name in phases:
        hardware = max(plan.gains, key=lambda key: plan.gains[key][name], default=None)
        if hardware is not None:
            gain = plan.gains[hardware][name]
            found.append(
                f"{name}: of the hardware, twice the {hardware.replace('_', ' ')} would help most: {gain:+.1%}"
            )
        best = next(iter(better.get(name, [])), None)
        if best is not None and best.gain > _WORTH:
            found.append(f"{name}: of the layout, {best.change} would help most: {best.gain:+.1%} tokens/s")
        elif best is not None:
            found.append(f"{name}: of the layout, no single change would help (best: {best.change}, {best.gain:+.1%})")
    return found


def _memory(phase: PhasePlan) -> str:
    m = phase.memory
    parts = {"weights": m.weights, "cache": m.kv_cache, "activations": m.activations, "buffers": m.buffers}
    text = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    return f"memory {size_text(m.total)} of {size_text(m.capacity)} a device: {text}"


def size_text(size: float) -> str:
    """Bytes in GB or MB."""
    return f"{figures(size / 1e9)} GB" if size >= 1e8 else f"{figures(size / 1e6)} MB"


def _ops(phase: PhasePlan) -> None:
    ops = sorted(phase.ops, key=lambda op: -op.cost.time_us)
    wide = max(len(op.name) for op in ops[:_SHOWN])
    for op in ops[:_SHOWN]:
        share = op.cost.time_us / phase.serial_us
        line = f"{op.op:13} {op.name:{wide}} {op.calls:5} x {op.cost.time_us / op.calls:10.2f} us"
        print(f"    {line} {op.cost.time_us / 1e3:10.3f} ms {share:6.1%}  {op.cost.bound}")
    rest = sum(op.cost.time_us for op in ops[_SHOWN:])
    if rest:
        print(f"    {len(ops) - _SHOWN} more: {figures(rest / 1e3)} ms {rest / phase.serial_us:.1%}")


def _side_by_side(model: str, plans: list[Plan], phases: tuple[str, ...]) -> None:
    rows: dict[str, list[str]] = {
        "layout": [layout_text(p.layout) for p in plans],
        "recipe": [p.recipe.name for p in plans],
    }
    for name in phases:
        found = [p.phases[name] for p in plans]
        rows |= {
            f"{name} tokens/s a device": [figures(p.per_device) for p in found],
            f"{name} tokens/s a node": [f"{p.per_node:,.0f}" for p in found],
            f"{name} step": [f"{figures(p.step_us / 1e3)} ms" for p in found],
            f"{name} overlapped": ["yes" if p.overlapped else "no" for p in found],
            f"{name} exposed communication": [f"{figures(p.exposed_us / 1e3)} ms" for p in found],
            f"{name} attention": [p.choice.form for p in found],
            f"{name} crossover context": [str(p.choice.crossover or "none") for p in found],
            f"{name} MFU": [f"{p.mfu:.1%}" for p in found],
            f"{name} bound": [p.bound for p in found],
            f"{name} memory": [f"{size_text(p.memory.total)} of {size_text(p.memory.capacity)}" for p in found],
        }
    print(model)
    heads = [p.target.name for p in plans]
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows.values(), strict=True)]
    for title, cells in {"": heads, **rows}.items():
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"{title:30} {line}".rstrip())
