"""`moec compile`: a model to an artifact, or to a plan only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.cli.arguments import Dp, Ep, Pp, Ranks, Redundant, Tp
from moec.cli.command import INSIDE, LAYOUT, MODEL, OUTPUT, TARGET
from moec.cli.options import parse_overrides

_EXAMPLES = """\
moec compile tiny-deepseek-v3 --out tiny.moec
moec compile path/to/hf-folder --recipe fp32 --context 2048 --out model.moec
moec compile deepseek-v3 --target h800-ep144 --phase decode --plan-only --out v3.plan
moec compile deepseek-v3 --target h800 --set num_hidden_layers=4 --no-weights --out v3.moec
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compile", epilog=_EXAMPLES)(compile_model)


def compile_model(
    model: Annotated[str, typer.Argument(help="Preset, Hugging Face folder, FILE.py:Model, or FILE.onnx.")],
    out: Annotated[Path | None, typer.Option(help="Artifact folder to write.", rich_help_panel=OUTPUT)] = None,
    target: Annotated[
        str, typer.Option(help="Hardware description: a name or a YAML file.", rich_help_panel=TARGET)
    ] = "cpu",
    phase: Annotated[
        str, typer.Option(help="Entry points to keep: both, prefill or decode.", rich_help_panel=TARGET)
    ] = "both",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Most sequences at once.", show_default="CPU: 1, else 128", rich_help_panel=TARGET),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most tokens of a sequence.", show_default="the model's, at most 4096", rich_help_panel=TARGET
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a prefill chunk.",
            show_default="CPU: 256, AMX: 1024, else 4096",
            rich_help_panel=TARGET,
        ),
    ] = None,
    mtp: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Add the multi-token-prediction module, for up to N drafted tokens a step.",
            rich_help_panel=MODEL,
        ),
    ] = 0,
    ranks: Ranks = None,
    tp: Tp = 1,
    dp: Dp = None,
    ep: Ep = None,
    redundant: Redundant = None,
    pp: Pp = 1,
    pad: Annotated[
        bool,
        typer.Option(
            "--pad",
            help="Fill up feed-forward widths with zeros where TP would cut scale blocks.",
            rich_help_panel=LAYOUT,
        ),
    ] = False,
    recipe: Annotated[
        str,
        typer.Option(
            help="auto, deepseek-v3, weight-only, mxfp4-experts, per-tensor, per-channel, bf16, fp32, or FILE.yaml.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    weights: Annotated[Path | None, typer.Option(help="Folder of safetensors.", rich_help_panel=MODEL)] = None,
    random_weights: Annotated[
        int | None, typer.Option(metavar="SEED", help="Random weights from a seed.", rich_help_panel=MODEL)
    ] = None,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Compile the program only.", rich_help_panel=MODEL)
    ] = False,
    source: Annotated[
        bool,
        typer.Option(
            "--source",
            help="Add the text of CPU kernels: TVMScript, LLVM IR, assembly, a Makefile.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Write program.ir and plan.json only.", rich_help_panel=OUTPUT)
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a field of the configuration.", rich_help_panel=MODEL),
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            metavar="SPEC",
            help="Add a pass or set its options: name{key=value}; see moec ir passes.",
            rich_help_panel=INSIDE,
        ),
    ] = None,
    dump_ir: Annotated[
        Path | None, typer.Option(help="Folder for the text after every pass.", rich_help_panel=INSIDE)
    ] = None,
    verify: Annotated[
        str, typer.Option(help="structure, roundtrip or numerics.", rich_help_panel=INSIDE)
    ] = "structure",
    strict: Annotated[
        bool, typer.Option("--strict", help="Turn warnings into errors.", rich_help_panel=INSIDE)
    ] = False,
) -> None:
    """Compile a model for a target."""
    from moec.cli.options import check_compile, check_phase, check_recipe
    from moec.cli.output import Progress, note
    from moec.codegen.artifact import check_output
    from moec.passes.planning.layout import LayoutRequest
    from moec.stages import trace

    check_phase(phase)
    check_compile(out, plan_only, verify, weights, random_weights, no_weights, source)
    check_recipe(recipe)
    if out is not None:
        check_output(out)
    traced = trace(model, parse_overrides(settings or []), weights, mtp=mtp > 0)
    plan = traced.optimize(
        target, phase=phase, batch=batch, context=context, chunk=chunk, drafts=mtp,
        layout=LayoutRequest(ranks, tp, dp, ep, redundant, pp, pad), recipe=recipe,
        passes=passes or [], verify=verify, strict=strict, dump=dump_ir,
    )  # fmt: skip
    waiting = [*traced.notes, *(f"{record.name}: {line}" for record in plan.records for line in record.notes)]
    waiting += [f"warning: {line}" for line in plan.warnings]
    if ignored := getattr(plan.source.config, "ignored", ()):
        waiting.insert(0, f"config: no effect on inference: {', '.join(ignored)}")
    if dump_ir is not None:
        waiting.append(f"dumps: {dump_ir}/report.html and index.md")

    def say(line: str) -> None:
        # Notes wait until the weights are found right, so that wrong input gets one line and no more.
        while waiting:
            note(waiting.pop(0))
        note(line)

    if out is None:
        say("planned only: nothing written (name a folder with --out)")
        return
    if plan_only:
        plan.save(out)
        say(f"wrote {out}: program.ir and plan.json only")
        return
    with Progress("packing") as progress:
        artifact = plan.compile(
            out, weights=weights, random_weights=random_weights, no_weights=no_weights, source=source, note=say,
            progress=progress,
        )  # fmt: skip
    say(f"wrote {artifact.path}")
