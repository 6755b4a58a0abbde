"""`moec plan`: what a model will do on a target, before anything is compiled or rented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.arguments import Dp, Ranks, Redundant, Tp
from moec.cli.command import LAYOUT, QUESTIONS, TRAINING, WORK
from moec.cli.output import note

if TYPE_CHECKING:
    from moec.ir import Module
    from moec.passes.planning import Alternative, Options, Plan
    from moec.targets import Target

    Answer = tuple[Plan, Plan | None, dict[str, list[Alternative]]]

PHASES = ("both", "prefill", "decode", "train")
_GPU_WORK = {"batch": 128, "chunk": 16384}
_CPU_WORK = {"batch": 1, "chunk": 256}
_CONTEXT = 4096

_EXAMPLES = """\
moec plan deepseek-v3 --target h800-ep144 --context 4096 --batch 128
moec plan deepseek-v3 --target h20,h800 --ranks 16 --what-if nvlink=2x
moec plan deepseek-v3 --target h800-ep144 --search --max-ms 50
moec plan deepseek-v3 --target h800-2048 --phase train
"""


def register(app: typer.Typer) -> None:
    """Add `moec plan`."""
    app.command("plan", epilog=_EXAMPLES)(plan)


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset or a model folder.")],
    target: Annotated[str, typer.Option(help="Shipped targets or files, separated by commas to compare.")] = "cpu",
    phase: Annotated[str, typer.Option(help="both, prefill, decode or train.", rich_help_panel=WORK)] = "both",
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Requests of an attention replica in a decode step.",
            show_default="128; CPU: 1",
            rich_help_panel=WORK,
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Tokens that a decoded token attends to [4096]; lists compare attention's forms.",
            rich_help_panel=WORK,
        ),
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of a prompt.", show_default="4096", rich_help_panel=WORK)
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a replica prefills in a step.", show_default="16384; CPU: 256", rich_help_panel=WORK
        ),
    ] = None,
    ranks: Ranks = None,
    tp: Tp = 1,
    dp: Dp = None,
    pp: Annotated[
        int | None,
        typer.Option(
            help="Pipeline stages, each with its own layers.", show_default="1; train: 16", rich_help_panel=LAYOUT
        ),
    ] = None,
    ep: Annotated[
        int | None,
        typer.Option(
            help="Devices that share the routed experts.",
            show_default="all of a stage; train: 64",
            rich_help_panel=LAYOUT,
        ),
    ] = None,
    redundant: Redundant = None,
    balance: Annotated[
        float | None,
        typer.Option(
            help="Mean over maximum of the devices' expert rows.",
            show_default="expected of the step",
            rich_help_panel=LAYOUT,
        ),
    ] = None,
    overlap: Annotated[
        str, typer.Option(help="Two micro-batches hide communication: auto, on, off.", rich_help_panel=LAYOUT)
    ] = "auto",
    recipe: Annotated[str, typer.Option(help="auto, deepseek-v3, weight-only or bf16.", rich_help_panel=WORK)] = "auto",
    what_if: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE", help="Plan again with one number changed, e.g. nvlink=2x.", rich_help_panel=QUESTIONS
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Find the best layout and batch of the ranks.", rich_help_panel=QUESTIONS)
    ] = False,
    max_ms: Annotated[
        float | None,
        typer.Option(
            "--max-ms",
            help="With --search: most milliseconds of a token (prefill: of the first one).",
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Pipeline schedule: 1f1b, zb1p, dualpipe, dualpipev.",
            show_default="dualpipe",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    sequence: Annotated[
        int | None, typer.Option(help="Tokens of a sequence.", show_default="4096", rich_help_panel=TRAINING)
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Sequences of a step.", show_default="15360", rich_help_panel=TRAINING)
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Sequences of a micro-batch.", show_default="1", rich_help_panel=TRAINING)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the model's configuration.", rich_help_panel=WORK),
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write a page with plots: one HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict step times, rates and memory on a target.

    Time per op, first-token time, attention forms and what bounds each phase; or a training step.

    A model that does not fit is planned all the same, with a warning that says what would fit.
    """
    import moec
    from moec import targets
    from moec.cli.options import UsageError, parse_numbers, parse_overrides
    from moec.errors import near
    from moec.passes.planning import LayoutRequest, Options, TrainOptions, changed

    names = target.split(",")
    if len(set(names)) < len(names):
        raise UsageError(message=f"--target names a target twice: {target}")
    if phase not in PHASES:
        raise UsageError(message=f"unknown --phase {phase!r}{near(phase, list(PHASES))}; one of {', '.join(PHASES)}")
    batches, contexts = parse_numbers("--batch", batch), parse_numbers("--context", context)
    swept = len(batches) > 1 or len(contexts) > 1
    _check_together(phase, search, max_ms, page)
    _check_phase_options(
        phase,
        {"--batch": batch, "--context": context, "--prompt": prompt, "--chunk": chunk,
         "--overlap": None if overlap == "auto" else overlap},
        {"--schedule": schedule, "--sequence": sequence, "--global-batch": global_batch, "--micro-batch": micro_batch},
    )  # fmt: skip
    if swept:
        _check_sweep(phase, search, prompt, page)
    loaded = [targets.load(name.strip()) for name in names]
    traced = moec.trace(model, parse_overrides(settings or []))
    limit = int(traced.source.config.max_position_embeddings)
    if phase == "train":
        from moec.cli.plan_train import check_schedule, default_batch, default_layout, run_training

        schedule, sequence, micro_batch = (
            "dualpipe" if schedule is None else schedule,
            4096 if sequence is None else sequence,
            1 if micro_batch is None else micro_batch,
        )
        check_schedule(schedule)
        changed_targets = loaded if what_if is None else [*loaded, *(changed(t, what_if) for t in loaded)]
        count = ranks or loaded[0].cluster.ranks
        stages, experts = default_layout(traced.ir, count, pp, ep)
        sequences = global_batch if global_batch is not None else default_batch(count // (tp * stages), micro_batch)
        layout = LayoutRequest(ranks, tp, dp, experts, redundant, stages)
        training = TrainOptions(sequence, sequences, micro_batch, schedule, layout, recipe, balance)
        run_training(model, traced.ir, changed_targets, training, as_json)
        return
    layout = LayoutRequest(ranks, tp, dp, ep, redundant, 1 if pp is None else pp)
    asked = []
    for one in loaded:
        work = _CPU_WORK if one.kind == "cpu" else _GPU_WORK
        options = Options(
            batch=batches[0] if batches else work["batch"],
            context=contexts[0] if contexts else min(_CONTEXT, limit),
            prompt=min(_CONTEXT, limit) if prompt is None else prompt,
            chunk=work["chunk"] if chunk is None else chunk,
            layout=layout,
            recipe=recipe,
            balance=balance,
            overlap=overlap,
        )
        asked.append(options)
    if search:
        from moec.cli.plan_search import run_search

        over = loaded if what_if is None else [changed(one, what_if) for one in loaded]
        run_search(model, traced.ir, over, asked[0], "decode" if phase == "both" else phase, max_ms, as_json)
        return
    if swept:
        from moec.cli.plan_sweep import run_sweep

        pairs = [(each, o) for t, o in zip(loaded, asked, strict=True) for each in _both(t, what_if)]
        run_sweep(model, traced.ir, pairs, batches, contexts, as_json)
        return
    answers = [_plans(traced.ir, one, options, what_if) for one, options in zip(loaded, asked, strict=True)]
    _report(model, answers, what_if, phase, as_json)
    if page is not None:
        from moec.passes.planning.page import write_page

        write_page(page, model, traced.ir, [plan for answer in answers for plan in answer[:2] if plan is not None])
        note(f"wrote {page}")


def _both(target: Target, what_if: str | None) -> list[Target]:
    """The target, and with a what-if the changed one."""
    from moec.passes.planning import changed

    return [target] if what_if is None else [target, changed(target, what_if)]


def _check_sweep(phase: str, search: bool, prompt: int | None, page: Path | None) -> None:
    from moec.cli.options import UsageError

    other = {"--search": search, f"--phase {phase}": phase != "both", "--page": page is not None}
    for option, given in {**other, "--prompt": prompt is not None}.items():
        if given:
            raise UsageError(message=f"lists of --batch and --context compare attention's forms: leave {option} away")


def _check_together(phase: str, search: bool, max_ms: float | None, page: Path | None) -> None:
    from moec.cli.options import UsageError

    if max_ms is not None and not search:
        raise UsageError(message="--max-ms limits a search: add --search")
    if search and phase == "train":
        raise UsageError(message="--search looks for serving layouts: use --phase decode or prefill")
    if page is not None and (search or phase == "train"):
        raise UsageError(message="--page shows plans of prefill and decode: leave --search and --phase train away")


def _check_phase_options(phase: str, serving: dict[str, Any], training: dict[str, Any]) -> None:
    """Raise UsageError for an option that the phase has no use for."""
    from moec.cli.options import UsageError

    for option in (o for o, value in (serving if phase == "train" else training).items() if value is not None):
        what, advice = ("serving", "leave it away") if phase == "train" else ("training", "add --phase train")
        raise UsageError(message=f"{option} is for {what}: {advice}")


def _plans(module: Module, target: Target, options: Options, what_if: str | None) -> Answer:
    from moec.passes.planning import alternatives, changed, make_plan

    other = None if what_if is None else changed(target, what_if)
    first = make_plan(module, target, options)
    return first, None if other is None else make_plan(module, other, options), alternatives(module, first)


def _report(model: str, answers: list[Answer], what_if: str | None, phase: str, as_json: bool) -> None:
    from moec.cli.plan_tables import print_plans

    shown = ("prefill", "decode") if phase == "both" else (phase,)
    plans = [plan for answer in answers for plan in answer[:2] if plan is not None]
    for plan in plans:
        where = f"{plan.target.name}: " if len(plans) > 1 else ""
        for warning in dict.fromkeys(plan.warnings):
            if phase == "both" or warning.startswith(phase):
                note(f"warning: {where}{warning}")
    if as_json:
        found = [_json(answer, what_if) for answer in answers]
        print(json.dumps(found[0] if len(found) == 1 else {"plans": found}, allow_nan=False))
    else:
        print_plans(model, plans, answers[0][2], shown)


def _json(answer: Answer, what_if: str | None) -> dict[str, Any]:
    from moec.passes.planning import as_json

    first, second, better = answer
    found = as_json(first, better)
    if second is not None:
        found["what_if"] = {"change": what_if, **as_json(second)}
    return found
