"""Every command that the README, docs and `--help` print is one that the parser takes; links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from moec.cli import UsageError, make_app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUP = typer.main.get_group(make_app([]))
END = re.compile(r"\s{2,}\S.*$|\s+#.*$")
"""What stands behind a command: its explanation in a column of its own, or a comment."""


def commands(group: TyperGroup = GROUP, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    """Every command by its words."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, (*path, name))
        elif isinstance(command, TyperCommand):
            yield (*path, name), command


def calls(text: str) -> list[str]:
    """The calls of moec in a page's blocks, without prompts, explanations and what is around a pipe."""
    lines = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            lines += [part for part in split(END.sub("", line.removeprefix("$ "))) if part.startswith("moec ")]
    return lines


def split(line: str) -> list[str]:
    """The commands of a shell line, around `|`, `;` and `&&`."""
    if not line.startswith("moec "):  # what a command prints may be no shell at all
        return []
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
    lexer.whitespace_split, lexer.commenters = True, ""
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|;&"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [shlex.join(part) for part in parts]


def found(line: str) -> tuple[TyperCommand | TyperGroup, list[str]]:
    """The command of a line, and the words behind it; raises UsageError where there is none."""
    words = shlex.split(line)[1:]
    command: Any = GROUP
    context = typer.Context(GROUP)
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        _, command, words = command.resolve_command(context, words)
    assert isinstance(command, TyperCommand | TyperGroup)
    return command, words[: words.index(">")] if ">" in words else words


def options(command: TyperCommand | TyperGroup) -> set[str]:
    return {"--help", "-h"}.union(*(p.opts + p.secondary_opts for p in command.params))


def is_form(line: str) -> bool:
    """Whether a line shows a form of call with placeholders, not a call."""
    return bool(re.search(r"[ ']\[-|\.\.\.|\w\|\w| \($", line)) or len(line.split()) == 2


CALLS = [(page.name, line) for page in PAGES for line in calls(page.read_text()) if not is_form(line)]
EXAMPLES = [
    (" ".join(path), part)
    for path, command in commands()
    for line in (command.epilog or "").splitlines()
    for part in split(line)
]
EVERY_OPTION = set().union(*(options(command) for _, command in commands()))
BENCHMARKS = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
OTHERS = {"--index-url", "--init-expert-location"}
"""Options of other programs that pages name."""
ENTRY_POINTS = set(re.findall(r"moec\.\w+", (ROOT / "examples/plugin/pyproject.toml").read_text()))


@pytest.mark.parametrize(("place", "line"), CALLS + EXAMPLES, ids=lambda text: text[:60])
def test_the_parser_takes_a_call(place: str, line: str) -> None:
    try:
        command, words = found(line)
        if words:
            command.make_context("moec", words)
    except UsageError as error:
        pytest.fail(f"{place}: {line}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for line in re.findall(r"`(moec [^`\n]+)`", text):
        command, words = found(line)
        assert {w.partition("=")[0] for w in words if w.startswith("--")} <= options(command), line
    for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text):
        assert link.startswith(("http:", "https:")) or (page.parent / link).exists(), link
    for name in re.findall(r"`(--[a-z-]+)", text):
        assert name in EVERY_OPTION | OTHERS or f'"{name}"' in BENCHMARKS, name
    for path in re.findall(r"`((?:[a-z_]+/)+[a-z_0-9-]+\.(?:py|yaml|md))`", text):
        assert (ROOT / path).exists() or any(ROOT.glob(f"**/{path}")), path
    for name in re.findall(r"`(moec(?:\.[a-zA-Z_]\w*)+)(?:\(|`)", text):
        assert name in ENTRY_POINTS or resolved(name), name


def resolved(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    words = name.split(".")
    for cut in range(len(words), 0, -1):
        try:
            thing: object = importlib.import_module(".".join(words[:cut]))
        except ImportError:
            continue
        return not any((thing := getattr(thing, word, None)) is None for word in words[cut:])
    return False


def test_help_of_every_command_has_examples_or_needs_none() -> None:
    bare = {" ".join(path) for path, command in commands() if not command.epilog}
    assert bare <= {"tune", "doctor", "ir verify", "ir reference", "ir passes"} | {
        path for path in bare if path.startswith(("models ", "targets "))
    }
