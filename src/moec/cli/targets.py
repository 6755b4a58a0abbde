"""`moec targets`: the hardware descriptions that moec knows, and checks of a user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.errors import InputError

if TYPE_CHECKING:
    from moec.targets import Target


class WrongTargetFiles(InputError):
    """At least one checked file has problems."""

    template = "{count} problem{s} in {files}"


def register(app: typer.Typer) -> None:
    """Add `moec targets list|show|check`."""
    group = typer.Typer(no_args_is_help=True, help="Hardware descriptions: list, show, check, calibrate.")
    group.command("list")(list_targets)
    group.command("show")(show)
    group.command("check")(check)
    app.add_typer(group, name="targets")


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def list_targets(as_json: Json = False) -> None:
    """List the shipped targets."""
    from moec import targets

    found = [targets.load(name) for name in targets.names()]
    if as_json:
        rows = [_row(target) for target in found]
        print(json.dumps({"targets": rows}))
        return
    width = max(len(t.name) for t in found)
    for target in found:
        ranks = f"{target.cluster.ranks:5d} devices" if target.cluster.ranks > 1 else " " * 13
        print(f"{target.name:{width}}  {target.kind:4}  {ranks}  {target.description}")


def _row(target: Target) -> dict[str, str | int]:
    return {
        "name": target.name,
        "kind": target.kind,
        "ranks": target.cluster.ranks,
        "description": target.description,
    }


def show(
    name: Annotated[str, typer.Argument(help="A shipped target or a file.")],
    as_json: Json = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print a file with every number.")] = False,
    measure: Annotated[bool, typer.Option(help="Measure this CPU's memory bandwidth (cpu only).")] = False,
) -> None:
    """Show a target's numbers with their sources."""
    from moec.targets import describe

    leaves = describe.leaves_of(name, measure)
    if as_json:
        print(json.dumps(describe.as_json(name, leaves)))
    elif as_yaml:
        print(describe.as_yaml(name, leaves), end="")
    else:
        print(describe.as_table(leaves))


def check(
    files: Annotated[list[str], typer.Argument(help="Target files (or shipped names).")],
    as_json: Json = False,
) -> None:
    """Check target files: every problem with its line, field, and what would be right."""
    from moec import targets

    problems = [problem for file in files for problem in targets.check(file)]
    if as_json:
        rows = [{"file": p.file, "line": p.line, "field": p.field, "message": p.message} for p in problems]
        print(json.dumps({"ok": not problems, "problems": rows}))
        if problems:
            raise typer.Exit(2)
        return
    for problem in problems:
        print(problem)
    if problems:
        wrong = sorted({p.file for p in problems})
        plural = "" if len(problems) == 1 else "s"
        raise WrongTargetFiles(count=len(problems), s=plural, files=", ".join(wrong))
    for file in files:
        print(f"{file}: ok" if not Path(file).is_file() else f"{file}: ok ({targets.load(file).name})")
