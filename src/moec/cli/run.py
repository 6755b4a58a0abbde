"""`moec run`: continue a prompt with a compiled artifact."""

from __future__ import annotations

import json
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.command import INSIDE, PROCESS, PROMPT, SAMPLING
from moec.errors import InputError

if TYPE_CHECKING:
    from moec.runtime import Model
    from moec.runtime.generate import Completions
    from moec.runtime.sampling import Sampling

_DEFAULT_NEW_TOKENS = 128


class OnePrompt(InputError):
    """None or several of the prompt options were given."""

    template = "give exactly one of --prompt, --chat and --prompt-ids"


class NotTokenIds(InputError):
    """--prompt-ids is no list of integers."""

    template = "--prompt-ids must be integers with commas between them (1,2,3), is {value!r}"


class NothingGenerated(InputError):
    """--compare with options of generation."""

    template = (
        "--compare runs the prompt only: leave --max-new-tokens, --temperature, --top-p, --seed, --speculate and "
        "--record-loads away"
    )


class OneProcess(InputError):
    """--compare under torchrun."""

    template = "--compare checks one process: compile the model without --ranks and run it without torchrun"


_EXAMPLES = """\
moec run tiny.moec --prompt 'import os' --temperature 0.6 --seed 1
moec run tiny.moec --prompt-ids 1,2,3 --json
"""


def register(app: typer.Typer) -> None:
    """Add `moec run`."""
    app.command("run", epilog=_EXAMPLES)(run)


def run(
    artifact: Annotated[str, typer.Argument(help="Folder that `moec compile` wrote.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", rich_help_panel=PROMPT)] = None,
    chat: Annotated[
        str | None, typer.Option(help="A user message, put into the model's chat template.", rich_help_panel=PROMPT)
    ] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(help="Token ids to continue: 1,2,3.", rich_help_panel=PROMPT)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="At most so many new tokens.",
            show_default=f"{_DEFAULT_NEW_TOKENS}, less if they do not fit",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: the most probable token.", rich_help_panel=SAMPLING)] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the most probable tokens that reach this sum.", rich_help_panel=SAMPLING)
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Draw from so many of the most probable tokens; 0: all.", rich_help_panel=SAMPLING)
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(help="Draw from tokens with this share of the greatest probability.", rich_help_panel=SAMPLING),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal text.", rich_help_panel=SAMPLING)] = 0,
    speculate: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Draft up to N tokens a step with the module of `moec compile --mtp`."),
    ] = 0,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of the kernels.", show_default="all usable CPUs", rich_help_panel=PROCESS),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="HF_FOLDER",
            help="Generate nothing: compare every op with these weights' reference.",
            rich_help_panel=INSIDE,
        ),
    ] = None,
    record_loads: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.npz", help="Count which experts tokens go to, for `moec place`.", rich_help_panel=INSIDE
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the hashes of weights, too.", rich_help_panel=INSIDE)
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Under torchrun: seconds that a rank may stay silent before all end.",
            show_default="30",
            rich_help_panel=PROCESS,
        ),
    ] = None,
    micro_batches: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Under torchrun, with --pp: parts of a decode step under way at a time.",
            rich_help_panel=PROCESS,
        ),
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue a prompt; the text appears as it is generated."""
    if sum(given is not None for given in (prompt, chat, prompt_ids)) != 1:
        raise OnePrompt()
    if compare is not None and (
        max_new_tokens is not None
        or record_loads is not None
        or (temperature, top_p, seed, speculate, top_k, min_p) != (0.0, 1.0, 0, 0, 0, 0.0)
    ):
        raise NothingGenerated()
    from moec.cli.options import UsageError
    from moec.cli.recording import check_place, recorded
    from moec.runtime import Sampling
    from moec.runtime.launch import TIMEOUT, first, launched, loaded

    if compare is not None and launched():
        raise OneProcess()
    if timeout is not None and not launched():
        raise UsageError(message="--timeout is for several processes: start them with torchrun")
    if micro_batches > 1 and not launched():
        raise UsageError(message="--micro-batches is for several processes: start them with torchrun")
    check_place(record_loads)
    sampling = Sampling(temperature, top_p, seed, top_k, min_p)
    ids = _parse_ids(prompt_ids) if prompt_ids is not None else None
    with loaded(artifact, check, threads, timeout or TIMEOUT, micro_batches) as model:
        if ids is None:
            ids = model.tokenizer.encode(prompt) if prompt is not None else model.tokenizer.encode_chat(chat or "")
        if compare is not None:
            _compare(model, compare, ids, as_json)
            return
        new = max_new_tokens if max_new_tokens is not None else _default_new(model, len(ids))
        with recorded(model, record_loads):
            if not first():
                model.complete(ids, new, sampling, speculate=speculate)
            elif as_json:
                done = model.complete(ids, new, sampling, speculate=speculate)
                print(json.dumps(_fields(model, done, artifact)))
            else:
                print(_summary(_stream(model, ids, new, sampling, speculate)), file=sys.stderr)


def _compare(model: Model, folder: str, ids: list[int], as_json: bool) -> None:
    """Print how far the artifact is from the folder's weights; exit code 1 when it departs."""
    from moec.cli.output import note
    from moec.compare import compare, report

    found = compare(model, folder, ids)
    for line in found.notes:
        note(line)
    if as_json:
        print(json.dumps({**found.as_json(), "artifact": str(model.artifact.path), "folder": folder}))
    else:
        print("\n".join(report(found)))
    if not found.agrees:
        raise typer.Exit(1)


def _default_new(model: Model, prompt: int) -> int:
    return max(1, min(_DEFAULT_NEW_TOKENS, model.context - prompt + 1))


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise NotTokenIds(value=text) from None


def _stream(model: Model, ids: list[int], new: int, sampling: Sampling, speculate: int) -> Completions:
    """Print text as it comes, or ids when the artifact has no tokenizer."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not model.has_tokenizer:

        def show(_: int, token: int) -> None:
            print(token, end=" ", flush=True)

        done = model.complete(ids, new, sampling, stream=show, speculate=speculate)
        print()
        return done
    text = model.tokenizer.stream()

    def write(_: int, token: int) -> None:
        print(text.push(token), end="", flush=True)

    done = model.complete(ids, new, sampling, stream=write, speculate=speculate)
    print(text.finish())
    return done


def _fields(model: Model, done: Completions, artifact: str) -> dict[str, object]:
    tokens = done.tokens[0]
    return {
        "token_ids": tokens,
        "text": model.tokenizer.decode(tokens) if model.has_tokenizer else None,
        "prefill_tokens_per_s": done.rates.prefill,
        "decode_tokens_per_s": done.rates.decode,
        "artifact": artifact,
        "target": model.artifact.manifest.target,
        **({"acceptance_rate": done.rates.acceptance} if done.rates.drafted_tokens else {}),
    }


def _summary(done: Completions) -> str:
    rates = done.rates
    decode = f", decode {rates.decode:,.0f} tokens/s" if rates.decode else ""
    prefill = f"{rates.prefill:,.0f}" if rates.prefill else "-"
    drafted = ""
    if rates.drafted_tokens:
        counts = f"{rates.accepted_tokens} of {rates.drafted_tokens}"
        drafted = f", {counts} drafted tokens kept ({rates.acceptance:.0%}) in {rates.decode_steps} steps"
    new = f"{len(done.tokens[0])} new{decode}{drafted}"
    return f"[{rates.prompt_tokens} prompt tokens, prefill {prefill} tokens/s; {new}]"
