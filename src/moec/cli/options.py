"""Options that several commands share, and checks that need more than one of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from moec.errors import InputError, near

VERIFY = ("structure", "roundtrip", "numerics")


class UsageError(InputError):
    """Options that do not fit together."""

    template: ClassVar[str] = "{message}"


def parse_overrides(settings: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` texts as a mapping; raises UsageError."""
    out: dict[str, str] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(message=f"--set wants KEY=VALUE, got {text!r}")
        if key in out:
            raise UsageError(message=f"--set {key} is given twice, as {out[key]} and {value}")
        out[key] = value
    return out


def parse_numbers(option: str, text: str | None) -> list[int]:
    """A whole number, or several separated by commas; none where nothing is given. Raises UsageError."""
    words = [] if text is None else [w.strip() for w in text.split(",")]
    if not all(re.fullmatch(r"-?\d{1,18}", w) for w in words):
        raise UsageError(message=f"{option} wants a whole number, or some separated by commas, got {text!r}")
    if len(set(words)) < len(words):
        raise UsageError(message=f"{option} names a number twice: {text}")
    return [int(w) for w in words]


def check_compile(
    out: Path | None, plan_only: bool, verify: str, weights: Any, random_weights: Any, no_weights: bool, source: bool
) -> None:
    """Raise UsageError for options of `moec compile` that contradict each other."""
    if out is None and not plan_only:
        raise UsageError(message="--out FOLDER is missing (or pass --plan-only)")
    check_verify(verify)
    given = [weights is not None, random_weights is not None, no_weights]
    if plan_only and any(given[:2]):
        raise UsageError(message="--plan-only packs no weights: leave --weights and --random-weights away")
    if plan_only and source:
        raise UsageError(message="--plan-only compiles no kernels: leave --source away")
    if sum(given) > 1:
        raise UsageError(message="--weights, --random-weights and --no-weights exclude each other")


def check_recipe(name: str) -> None:
    """Raise UnknownRecipe or RecipeError, before anything is traced or dumped."""
    from moec.passes import recipe

    if name != "auto":
        recipe.load(name)


def check_phase(phase: str) -> None:
    """Raise UsageError unless `phase` is one of the entry points, or both."""
    from moec.stages import PHASES

    if phase not in PHASES:
        raise UsageError(message=f"--phase {phase!r} is not known{near(phase, list(PHASES))}")


def check_verify(verify: str) -> None:
    """Raise UsageError unless `verify` is a kind of check."""
    if verify not in VERIFY:
        raise UsageError(message=f"--verify {verify!r} is not known{near(verify, list(VERIFY))}")
