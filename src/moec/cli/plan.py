"""`moec plan`: what a model will do on a target, before anything is compiled or rented."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.output import note

if TYPE_CHECKING:
    from moec.ir import Module
    from moec.passes.planning import Options, PhasePlan, Plan
    from moec.targets import Target

_SHOWN = 12
_GPU_WORK = {"batch": 128, "chunk": 16384}
_CPU_WORK = {"batch": 1, "chunk": 256}
_CONTEXT = 4096


def register(app: typer.Typer) -> None:
    """Add `moec plan`."""
    app.command("plan")(plan)


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset or a model folder.")],
    target: Annotated[str, typer.Option(help="Shipped targets or files, separated by commas to compare.")] = "cpu",
    batch: Annotated[
        int | None, typer.Option(help="Requests of an attention replica in a decode step [128; CPU: 1].")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens that a decoded token attends to [4096].")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of a prompt [4096].")] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens that a replica prefills in a step [16384; CPU: 256].")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Devices [the target's].")] = None,
    tp: Annotated[int, typer.Option(help="Devices of an attention replica.")] = 1,
    dp: Annotated[int | None, typer.Option(help="Attention replicas [ranks / TP].")] = None,
    pp: Annotated[int, typer.Option(help="Pipeline stages, each with its own layers.")] = 1,
    ep: Annotated[int | None, typer.Option(help="Devices that share the routed experts [all of a stage].")] = None,
    redundant: Annotated[
        int | None, typer.Option(help="Extra expert slots [fewest that divide and can even out the loads].")
    ] = None,
    balance: Annotated[
        float | None, typer.Option(help="Mean over maximum of the devices' expert rows [expected of the step].")
    ] = None,
    overlap: Annotated[str, typer.Option(help="Two micro-batches hide communication: auto, on, off.")] = "auto",
    recipe: Annotated[str, typer.Option(help="auto, deepseek-v3, weight-only or bf16.")] = "auto",
    what_if: Annotated[
        str | None, typer.Option(metavar="KEY=VALUE", help="Plan again with one number changed, e.g. nvlink=2x.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the model's configuration.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time per op, memory, rates, first-token time, attention forms and what bounds each phase.

    A model that does not fit is planned all the same, with a warning that says what would fit.
    """
    import moec
    from moec import targets
    from moec.cli.options import UsageError, parse_overrides
    from moec.passes.planning import LayoutRequest, Options

    names = target.split(",")
    if len(set(names)) < len(names):
        raise UsageError(message=f"--target names a target twice: {target}")
    loaded = [targets.load(name.strip()) for name in names]
    traced = moec.trace(model, parse_overrides(settings or []))
    limit = int(traced.source.config.max_position_embeddings)
    layout = LayoutRequest(ranks, tp, dp, ep, redundant, pp)
    answers = []
    for one in loaded:
        work = _CPU_WORK if one.kind == "cpu" else _GPU_WORK
        options = Options(
            batch=work["batch"] if batch is None else batch,
            context=min(_CONTEXT, limit) if context is None else context,
            prompt=min(_CONTEXT, limit) if prompt is None else prompt,
            chunk=work["chunk"] if chunk is None else chunk,
            layout=layout,
            recipe=recipe,
            balance=balance,
            overlap=overlap,
        )
        answers.append(_plans(traced.ir, one, options, what_if))
    for first, second in answers:
        for warning in dict.fromkeys(first.warnings + (second.warnings if second else [])):
            note(f"warning: {warning}")
    if as_json:
        found = [_json(first, second, what_if) for first, second in answers]
        print(json.dumps(found[0] if len(found) == 1 else {"plans": found}, allow_nan=False))
    else:
        _print(model, answers)


def _plans(module: Module, target: Target, options: Options, what_if: str | None) -> tuple[Plan, Plan | None]:
    from moec.passes.planning import changed, make_plan

    other = None if what_if is None else changed(target, what_if)
    return make_plan(module, target, options), None if other is None else make_plan(module, other, options)


def _json(first: Plan, second: Plan | None, what_if: str | None) -> dict[str, Any]:
    from moec.passes.planning import as_json

    answer = as_json(first)
    if second is not None:
        answer["what_if"] = {"change": what_if, **as_json(second)}
    return answer


def _print(model: str, answers: list[tuple[Plan, Plan | None]]) -> None:
    plans = [p for pair in answers for p in pair if p is not None]
    if len(plans) == 1:
        _details(model, plans[0])
    else:
        _side_by_side(model, plans)


def _details(model: str, plan: Plan) -> None:
    options = plan.options
    print(f"{model} on {plan.target.name}: {_layout(plan)}, recipe {plan.recipe.name}")
    for line in plan.notes:
        print(f"  note: {line}")
    for phase in plan.phases.values():
        work = f"{options.batch} requests at context {options.context}"
        if phase.phase == "prefill":
            work = f"{phase.tokens} tokens in prompts of {options.prompt}"
        print(f"\n{phase.phase}: {work} per replica; {_rates(phase)}")
        for line in (_times(phase), _balance(phase), _form(phase), _bounds(phase, plan), _memory(phase)):
            if line:
                print(f"  {line}")
        _ops(phase)
    print(f"\nfirst token after {plan.first_token_ms:.4g} ms, then one every {plan.time_per_token_ms:.4g} ms")


def _layout(plan: Plan) -> str:
    layout = plan.layout
    text = f"{layout.ranks} {'rank' if layout.ranks == 1 else 'ranks'}, TP {layout.tp}, DP {layout.dp}"
    if layout.pp > 1:
        text += f", PP {layout.pp}"
    if layout.experts:
        text += f", EP {layout.ep} ({layout.slots_per_device} of {layout.slots} experts a device)"
    return text


def _rates(phase: PhasePlan) -> str:
    node = f", {phase.per_node:,.0f} a node" if phase.layout.ranks > 1 else ""
    return f"{phase.per_device:,.4g} tokens/s a device{node}, MFU {phase.mfu:.1%}"


def _times(phase: PhasePlan) -> str:
    text = f"step {phase.step_us / 1e3:.4g} ms: one after the other {phase.serial_us / 1e3:.4g} ms"
    if phase.choice.cost.communication_us:
        text += f" (communication {phase.choice.cost.communication_us / 1e3:.4g} ms)"
    if phase.paired_us is not None:
        verdict = "taken" if phase.overlapped else "not taken"
        text += f", two overlapping micro-batches {phase.paired_us / 1e3:.4g} ms ({verdict})"
    return text


def _balance(phase: PhasePlan) -> str:
    if phase.layout.ep == 1:
        return ""
    return f"the busiest device receives {1 / phase.balance:.2f} times the mean (balance {phase.balance:.2f})"


def _form(phase: PhasePlan) -> str:
    times = ", ".join(f"{form} {time / 1e3:.4g} ms" for form, time in phase.choice.times_us.items())
    crossover = phase.choice.crossover
    flips = "no crossover up to the model's limit" if crossover is None else f"crossover at context {crossover}"
    return f"attention {phase.choice.form} ({times}); {flips}"


def _bounds(phase: PhasePlan, plan: Plan) -> str:
    parts = sorted(phase.by_bound.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name} {time / 1e3:.4g} ms" for name, time in parts if time)
    gains = {key: gain[phase.phase] for key, gain in plan.gains.items()}
    best = max(gains, key=lambda key: gains[key])
    return f"bound by {phase.bound} ({text}); twice the {best.replace('_', ' ')} gives {gains[best]:+.1%}"


def _memory(phase: PhasePlan) -> str:
    m = phase.memory
    parts = {"weights": m.weights, "cache": m.kv_cache, "activations": m.activations, "buffers": m.buffers}
    text = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return f"memory {_size(m.total)} of {_size(m.capacity)} a device: {text}"


def _size(size: float) -> str:
    return f"{size / 1e9:.4g} GB" if size >= 1e8 else f"{size / 1e6:.4g} MB"


def _ops(phase: PhasePlan) -> None:
    ops = sorted(phase.ops, key=lambda op: -op.cost.time_us)
    wide = max(len(op.name) for op in ops[:_SHOWN])
    for op in ops[:_SHOWN]:
        share = op.cost.time_us / phase.serial_us
        line = f"{op.op:13} {op.name:{wide}} {op.calls:5} x {op.cost.time_us / op.calls:10.2f} us"
        print(f"    {line} {op.cost.time_us / 1e3:10.3f} ms {share:6.1%}  {op.cost.bound}")
    rest = sum(op.cost.time_us for op in ops[_SHOWN:])
    if rest:
        print(f"    {len(ops) - _SHOWN} more: {rest / 1e3:.4g} ms {rest / phase.serial_us:.1%}")


def _side_by_side(model: str, plans: list[Plan]) -> None:
    rows: dict[str, list[str]] = {"layout": [_layout(p) for p in plans], "recipe": [p.recipe.name for p in plans]}
    for name in ("prefill", "decode"):
        phases = [p.phases[name] for p in plans]
        rows |= {
            f"{name} tokens/s a device": [f"{p.per_device:,.4g}" for p in phases],
            f"{name} tokens/s a node": [f"{p.per_node:,.0f}" for p in phases],
            f"{name} step": [f"{p.step_us / 1e3:.4g} ms" for p in phases],
            f"{name} overlapped": ["yes" if p.overlapped else "no" for p in phases],
            f"{name} exposed communication": [f"{p.exposed_us / 1e3:.4g} ms" for p in phases],
            f"{name} attention": [p.choice.form for p in phases],
            f"{name} crossover context": [str(p.choice.crossover or "none") for p in phases],
            f"{name} MFU": [f"{p.mfu:.1%}" for p in phases],
            f"{name} bound": [p.bound for p in phases],
            f"{name} memory": [f"{_size(p.memory.total)} of {_size(p.memory.capacity)}" for p in phases],
        }
    print(model)
    heads = [p.target.name for p in plans]
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows.values(), strict=True)]
    for title, cells in {"": heads, **rows}.items():
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"{title:30} {line}".rstrip())
