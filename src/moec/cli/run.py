"""`moec run`: continue a prompt with a compiled artifact."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.arguments import CheckWeights, Threads
from moec.cli.command import INSIDE, PROCESS, PROMPT, SAMPLING
from moec.errors import InputError

if TYPE_CHECKING:
    from moec.runtime import Model
    from moec.runtime.sampling import Sampling

_DEFAULT_NEW_TOKENS = 128


class OnePrompt(InputError):
    """None or several of the prompt options were given."""

    template = "give exactly one of --prompt, --chat (or --messages, or both), --prompt-ids and --prompts"


class NothingGenerated(InputError):
    """--compare with options of generation."""

    template = (
        "--compare runs one prompt only: leave --prompts, --max-new-tokens, --temperature, --top-p, --seed, --stop, "
        "--speculate and --record-loads away"
    )


class OneProcess(InputError):
    """--compare under torchrun."""

    template = "--compare checks one process: compile the model without --ranks and run it without torchrun"


_EXAMPLES = """\
moec run tiny.moec --prompt 'import os' --temperature 0.6 --seed 1
git diff | moec run tiny.moec --prompt - --stop 'def '
moec run tiny.moec --prompts prompts.jsonl --max-new-tokens 32 > answers.jsonl
moec run tiny.moec --prompt-ids 1,2,3 --json
"""


def register(app: typer.Typer) -> None:
    """Add `moec run`."""
    app.command("run", epilog=_EXAMPLES)(run)


def run(
    artifact: Annotated[str, typer.Argument(help="Folder that `moec compile` wrote.")],
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; - for standard input.", rich_help_panel=PROMPT)
    ] = None,
    chat: Annotated[
        str | None,
        typer.Option(
            help="A user message, put into the model's chat template; - for standard input.", rich_help_panel=PROMPT
        ),
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.json",
            help="JSON list of turns before --chat, or without it; - for standard input.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system prompt before the conversation.", rich_help_panel=PROMPT)
    ] = None,
    chat_set: Annotated[
        list[str] | None,
        typer.Option(
            "--chat-set",
            metavar="KEY=VALUE",
            help="Variable of the chat template (enable_thinking=false).",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(help="Token ids to continue: 1,2,3.", rich_help_panel=PROMPT)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="JSON Lines of prompts (or - for standard input), answered by JSON Lines in their order.",
            rich_help_panel=PROMPT,
        ),
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
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text; may be given several times.", rich_help_panel=SAMPLING),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on behind end-of-sequence tokens.", rich_help_panel=SAMPLING)
    ] = False,
    speculate: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Draft up to N tokens a step with the module of `moec compile --mtp`."),
    ] = 0,
    threads: Threads = None,
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
    check: CheckWeights = False,
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
    """Continue a prompt; the text appears as it is generated.

    With --prompts many: a line is a JSON string, or an object with one of prompt, chat and prompt_ids.
    """
    talk = chat is not None or messages is not None
    if talk + sum(given is not None for given in (prompt, prompt_ids, prompts)) != 1:
        raise OnePrompt()
    if compare is not None and (
        max_new_tokens is not None
        or record_loads is not None
        or prompts is not None
        or stop
        or ignore_eos
        or (temperature, top_p, seed, speculate, top_k, min_p) != (0.0, 1.0, 0, 0, 0, 0.0)
    ):
        raise NothingGenerated()
    from moec.cli.conversation import WithoutChat, conversation, settings
    from moec.cli.options import UsageError
    from moec.cli.prompts import parse_ids, read_prompts, text_of
    from moec.cli.recording import check_place, recorded
    from moec.runtime import Sampling
    from moec.runtime.launch import TIMEOUT, first, launched, loaded

    if compare is not None and launched():
        raise OneProcess()
    if timeout is not None and not launched():
        raise UsageError(message="--timeout is for several processes: start them with torchrun")
    if micro_batches > 1 and not launched():
        raise UsageError(message="--micro-batches is for several processes: start them with torchrun")
    if stop and launched():
        raise UsageError(message="--stop is for one process: the ranks of torchrun would not end together")
    if "" in (stop or []):
        raise UsageError(message="--stop must not be empty")
    for option, value in (("--system", system), ("--chat-set", chat_set)):
        if value and not talk:
            raise WithoutChat(option=option)
    check_place(record_loads)
    sampling = Sampling(temperature, top_p, seed, top_k, min_p)
    ids = parse_ids(prompt_ids) if prompt_ids is not None else None
    if prompt is not None or chat is not None:
        prompt, chat = (None if text is None else text_of(text) for text in (prompt, chat))
    turns, variables = conversation(chat, messages, system), settings(chat_set or [])
    with loaded(artifact, check, threads, timeout or TIMEOUT, micro_batches) as model:
        if prompts is not None:
            asked = read_prompts(prompts, model)
        elif ids is not None:
            asked = [ids]
        else:
            text = model.tokenizer
            asked = [text.encode(prompt) if prompt is not None else text.encode_messages(turns, **variables)]
        if compare is not None:
            _compare(model, compare, asked[0], as_json)
            return
        new = max_new_tokens if max_new_tokens is not None else _default_new(model, max(map(len, asked)))
        with recorded(model, record_loads):
            work = _Work(model, asked, new, sampling, tuple(stop or ()), ignore_eos, speculate)
            if not first():
                work.run()
            elif prompts is not None:
                work.run()
                sys.stdout.writelines(f"{json.dumps(work.answer(i))}\n" for i in range(len(asked)))
                print(_summary(work), file=sys.stderr)
            elif as_json:
                work.run()
                print(json.dumps({**work.answer(0), **_rates(work), "artifact": artifact}))
            else:
                work.run(print_it=True)
                print(_summary(work), file=sys.stderr)


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


class _Work:
    """Prompts to continue, and what came of them."""

    def __init__(
        self, model: Model, prompts: list[list[int]], new: int, sampling: Sampling, stops: tuple[str, ...],
        ignore_eos: bool, speculate: int,
    ) -> None:  # fmt: skip
        from moec.runtime.errors import NoTokenizer
        from moec.runtime.stop_text import Continuation

        self.model, self.prompts, self.new, self.sampling = model, prompts, new, sampling
        self.stops, self.ignore_eos, self.speculate = stops, ignore_eos, speculate
        self.said = [""] * len(prompts)
        self._texts = [Continuation(model.tokenizer.stream(), stops) for _ in prompts] if model.has_tokenizer else []
        if stops and not self._texts:
            raise NoTokenizer(path=model.artifact.path, advice="leave --stop away")

    def run(self, print_it: bool = False) -> None:
        """Continue the prompts; `print_it`: the text as it comes, or ids when the artifact has no tokenizer."""

        def show(text: str) -> None:
            if print_it:
                print(text, end="", flush=True)

        def tell(index: int, token: int) -> bool:
            if not self._texts:
                show(f"{token} ")
                return False
            text = self._texts[index].push(token)
            self.said[index] += text
            show(text)
            return self._texts[index].ended

        ends = () if self.ignore_eos else None
        prompts = self.prompts if len(self.prompts) > 1 else self.prompts[0]
        self.done = self.model.complete(prompts, self.new, self.sampling, ends, tell, self.speculate)
        for index, text in enumerate(self._texts):
            rest = text.finish()
            self.said[index] += rest
            show(rest)
        show("\n")

    def answer(self, index: int) -> dict[str, object]:
        """What `--json` says of one prompt."""
        tokens = self.done.tokens[index]
        text: str | None = None
        if self._texts:
            # Under torchrun other replicas took some of the prompts: their tokens arrive, their text does not.
            text = self.said[index] if self.stops else self.model.tokenizer.decode(tokens)
        manifest = self.model.artifact.manifest
        at_end = bool(tokens) and tokens[-1] in manifest.eos_token_ids and not self.ignore_eos
        stopped = at_end or (bool(self._texts) and self._texts[index].ended)
        return {
            "token_ids": tokens,
            "text": text,
            "prompt_tokens": len(self.prompts[index]),
            "finish_reason": "stop" if stopped else "length",
        }


def _rates(work: _Work) -> dict[str, object]:
    rates = work.done.rates
    return {
        "prefill_tokens_per_s": rates.prefill,
        "decode_tokens_per_s": rates.decode,
        "target": work.model.artifact.manifest.target,
        **({"acceptance_rate": rates.acceptance} if rates.drafted_tokens else {}),
    }


def _summary(work: _Work) -> str:
    rates = work.done.rates
    decode = f", decode {rates.decode:,.0f} tokens/s" if rates.decode else ""
    prefill = f"{rates.prefill:,.0f}" if rates.prefill else "-"
    drafted = ""
    if rates.drafted_tokens:
        counts = f"{rates.accepted_tokens} of {rates.drafted_tokens}"
        drafted = f", {counts} drafted tokens kept ({rates.acceptance:.0%}) in {rates.decode_steps} steps"
    new = f"{sum(map(len, work.done.tokens))} new{decode}{drafted}"
    return f"[{rates.prompt_tokens} prompt tokens in {rates.prefill_seconds:.2f} s, prefill {prefill} tokens/s; {new}]"
