"""Measured speculative decoding: what is kept of the drafts on a text, and what that does to the rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np

from moec.runtime.engine import Ids
from moec.runtime.errors import WrongOption
from moec.runtime.model import Model, load
from moec.runtime.scheduler import Rates

_PROMPTS: Final = 8
_SCORED: Final = 4096
"""Tokens of the text on which the module's choices are compared with the model's."""


@dataclass(frozen=True)
class Speculated:
    """Greedy decoding with and without drafts, run in turns; times are medians over the runs, in milliseconds.

    `agreement`: share of the text's positions where the module's first choice is the model's own, one token later;
    `acceptance`: share of the drafted tokens that generation kept, `tokens_per_step` what a step yields a sequence.
    A step takes `draft_ms` and `verify_ms` in place of `step_ms`: `expected_speed_up` is what follows from these,
    `speed_up` the measured ratio of the rates.
    """

    artifact: str
    model: str
    recipe: str
    threads: int
    batch: int
    drafts: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    agreement: float | None
    acceptance: float
    tokens_per_step: float
    same_tokens: bool
    plain_tokens_per_s: float
    tokens_per_s: float
    step_ms: float
    draft_ms: float
    verify_ms: float
    expected_speed_up: float
    speed_up: float


def bench_speculation(
    path: str,
    drafts: int,
    text: str | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repeat: int = 3,
    batch: int = 1,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda note: None,
) -> Speculated:
    """Continue prompts from all over `text` greedily, `batch` at a time, with and without `drafts` a step.

    Without a text prompts are random tokens. Raises WrongOption, NoTokenizer, PromptTooLong or NoRoom.
    """
    model = load(path, threads=threads)
    most = model.artifact.manifest.drafts
    if not 1 <= drafts <= most:
        expected = f"1 to {most}, as compiled" if most else "0: compile with --mtp 1 for a module that drafts"
        raise WrongOption(option="speculate", expected=expected, value=drafts)
    if not 1 <= batch <= model.engine.batch:
        raise WrongOption(option="batch", expected=f"1 to {model.engine.batch}, as compiled", value=batch)
    prompt = prompt_tokens if prompt_tokens is not None else max(1, min(128, model.context // 2))
    new = new_tokens if new_tokens is not None else min(64, model.context - prompt + 1)
    prompts, ids = _prompts(model, text, prompt, batch)
    agreement = None if ids is None else _agreement(model, ids[:_SCORED])
    model.engine.weights.settle()
    runs: list[tuple[Rates, Rates]] = []
    same = True
    for run in range(repeat + 1):
        plain = [model.complete(few, new, stop=()) for few in prompts]
        drafted = [model.complete(few, new, stop=(), speculate=drafts) for few in prompts]
        same &= [c.tokens for c in plain] == [c.tokens for c in drafted]
        runs.append((_sum([c.rates for c in plain]), _sum([c.rates for c in drafted])))
        rates = ", ".join(f"{r.decode or 0:,.1f}" for r in runs[-1])
        progress(f"{'warm-up' if run == 0 else f'run {run} of {repeat}'}: plain and drafted {rates} tokens/s")
    timed = runs[1:]
    step = median(p.decode_seconds / p.decode_steps for p, _ in timed)
    draft = median(d.draft_seconds / d.decode_steps for _, d in timed)
    verify = median((d.decode_seconds - d.draft_seconds) / d.decode_steps for _, d in timed)
    first, last = timed[0]
    gain = first.decode_steps / last.decode_steps
    return Speculated(
        artifact=path,
        model=model.artifact.manifest.model,
        recipe=model.artifact.manifest.recipe,
        threads=model.engine.threads,
        batch=batch,
        drafts=drafts,
        prompts=sum(map(len, prompts)),
        prompt_tokens=prompt,
        new_tokens=new,
        agreement=agreement,
        acceptance=last.acceptance or 0.0,
        tokens_per_step=gain,
        same_tokens=same,
        plain_tokens_per_s=median(p.decode or 0.0 for p, _ in timed),
        tokens_per_s=median(d.decode or 0.0 for _, d in timed),
        step_ms=step * 1e3,
        draft_ms=draft * 1e3,
        verify_ms=verify * 1e3,
        expected_speed_up=gain * step / (draft + verify),
        speed_up=median((d.decode or 0.0) / (p.decode or 1.0) for p, d in timed),
    )


def _prompts(model: Model, text: str | None, length: int, batch: int) -> tuple[list[list[Ids]], Ids | None]:
    """Batches of prompts spread evenly over the text, and its tokens."""
    count = -(-max(_PROMPTS, batch) // batch) * batch
    if text is None:
        ids = np.random.default_rng(0).integers(0, model.vocab, count * length)
    else:
        ids = np.array(model.tokenizer.encode(text), dtype=np.int64)
        if len(ids) < length + 1:
            expected = f"below {len(ids)}, the tokens of the text"
            raise WrongOption(option="prompt-tokens", expected=expected, value=length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    prompts = [ids[start : start + length] for start in starts]
    return [prompts[i : i + batch] for i in range(0, count, batch)], None if text is None else ids


def _agreement(model: Model, ids: Ids) -> float | None:
    """Share of positions where the module, a token early, chooses what the model chooses; in windows of the context."""
    agreed = total = 0
    window = min(model.context, 512)
    for begin in range(0, len(ids) - 2, window):
        piece = ids[None, begin : begin + window]
        if piece.shape[1] < 3:
            break
        early = model.draft_logits(piece)[0].argmax(-1)
        own = model.logits(piece)[0, 1:].argmax(-1)
        agreed += int((early == own).sum())
        total += len(own)
    return agreed / total if total else None


def _sum(rates: list[Rates]) -> Rates:
    """Tokens and seconds of several runs together."""
    return Rates(**{key: sum(vars(r)[key] for r in rates) for key in vars(rates[0])})
