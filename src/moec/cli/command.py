"""What all commands share: checks of values that no option means, and the layout of `--help`.

A command's options stand under the heading that `rich_help_panel` names, those without one
under "Options". The examples are the command's `epilog`, a line each.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import typer
from typer.core import TyperCommand

SHORT: Final = {"help_option_names": ["-h", "--help"]}
"""Settings of commands and groups: `-h` beside `--help`."""

MODEL: Final = "Model and weights"
TARGET: Final = "Target and limits"
MACHINE: Final = "Machine"
LAYOUT: Final = "Several devices"
WORK: Final = "Work"
PROMPT: Final = "Prompt"
SAMPLING: Final = "Sampling"
QUESTIONS: Final = "Questions"
TRAINING: Final = "Training (--phase train)"
PROCESS: Final = "Process"
SERVER: Final = "Server"
INSIDE: Final = "Looking inside"
OUTPUT: Final = "Output"
_HEADINGS: Final = (
    MODEL, TARGET, MACHINE, PROMPT, WORK, SAMPLING, SERVER, LAYOUT, QUESTIONS, TRAINING, PROCESS, INSIDE, OUTPUT,
    "Options",
)  # fmt: skip

_GREATEST: Final = (1 << 63) - 1
_TYPES: Final = {
    "<int range>": "N", "<int>": "N", "<float range>": "X", "<float>": "X", "<str>": "TEXT", "<path>": "PATH",
}  # fmt: skip
_NAMED: Final = re.compile(r"default: \((.*?)\)(?=[;\]])")
_RANGE: Final = re.compile(r"\b(\S+)<=x<=(\S+)\b|\bx(>=|<=)(\S+)\b")


class Command(TyperCommand):
    """A command that refuses empty paths and numbers beyond 64 bits; its help is laid out as this module says."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Also raises BadParameter for what the class refuses."""
        words = list(args)
        rest = super().parse_args(ctx, args)
        param: Any
        for param in self.params:
            value = ctx.params.get(param.name or "")
            if isinstance(value, int) and abs(value) > _GREATEST:
                raise typer.BadParameter("a number of at most 64 bits is meant", ctx=ctx, param=param)
            paths = value if isinstance(value, list) else [value]
            # An empty path is the current folder to pathlib, and never what was meant.
            if Path() in paths and _empty(param, words):
                raise typer.BadParameter("the path is empty", ctx=ctx, param=param)
        return rest

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Arguments in capitals."""
        return [
            re.sub(r"\{(.*?)\}", lambda name: name[1].upper(), piece) for piece in super().collect_usage_pieces(ctx)
        ]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section a heading."""
        arguments: list[tuple[str, str]] = []
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in _HEADINGS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                arguments.append((record[0].partition(" <")[0].upper(), record[1]))
            else:
                sections[getattr(param, "rich_help_panel", None) or "Options"].append(_row(*record))
        for heading, rows in {"Arguments": arguments, **sections}.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, unwrapped."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write("Examples:\n")
            for line in self.epilog.splitlines():
                formatter.write(f"  {line}\n")


def _empty(param: Any, words: list[str]) -> bool:
    """Whether `words` give the parameter an empty text."""
    if param.param_type_name == "argument":
        return "" in words
    return any(f"{name}=" in words or (name, "") in pairwise(words) for name in param.opts)


def _row(names: str, text: str) -> tuple[str, str]:
    """An entry with a placeholder in place of a type, and ranges in words."""
    for shown, word in _TYPES.items():
        names = names.replace(shown, word)
    return names, _RANGE.sub(
        lambda r: f"from {r[1]} to {r[2]}" if r[1] else _bound(r[3], r[4]), _NAMED.sub(r"default: \1", text)
    )


def _bound(sign: str, number: str) -> str:
    return f"at {'least' if sign == '>=' else 'most'} {number}"
