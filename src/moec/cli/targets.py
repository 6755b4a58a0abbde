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
    """Add `moec targets list|show|check|calibrate|topologies`."""
    group = typer.Typer(no_args_is_help=True, help="Hardware descriptions: list, show, check, calibrate.")
    group.command("list")(list_targets)
    group.command("show")(show)
    group.command("check")(check)
    group.command("calibrate")(calibrate)
    group.command("topologies")(topologies)
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
    """Check target files.

    Every problem with its line, field, and what would be right.
    """
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
        name = f" ({targets.load(file).name})" if Path(file).is_file() else ""
        lent = targets.assumed_from(file)
        print(f"{file}: ok{name}{f', its cost model is assumed to be as on {lent}' if lent else ''}")


def calibrate(
    name: Annotated[str, typer.Argument(help="The target to start from: a shipped name or a file.")],
    rows: Annotated[Path, typer.Option(help="JSON Lines: `moec cost` rows with time_us.")],
    out: Annotated[Path, typer.Option(help="Where the calibrated target file goes.")],
    source: Annotated[str, typer.Option(help="Where the measurements are from.")] = "",
    as_json: Json = False,
) -> None:
    """Fit a target's calibration to own measurements.

    The errors that are printed are on shapes that the fit did not see.
    """
    from moec import targets
    from moec.files import write_whole
    from moec.targets import describe
    from moec.targets.cost import fit

    measured = fit.read_rows(rows)
    fitted, report = fit.fit_and_check(targets.load(name), measured, source or f"fitted to {rows.name}")
    write_whole(out, describe.calibrated_yaml(name, fitted))
    if as_json:
        print(json.dumps({"out": str(out), "families": report}))
        return
    for family, found in report.items():
        print(
            f"{family:18}{found['rows']:6} rows, error {found['median_before']:.1%} before,"
            f" {found['median']:.1%} on unseen shapes (90th percentile {found['p90']:.1%})"
        )
    print(f"wrote {out}")


def topologies(
    ports: Annotated[int, typer.Option(help="Ports of a switch.")] = 64,
    planes: Annotated[int, typer.Option(help="Planes of the multi-plane fat tree.")] = 8,
    groups: Annotated[int | None, typer.Option(help="Groups of the dragonfly; the most when not given.")] = None,
    as_json: Json = False,
) -> None:
    """Endpoints, switches, links and price of scale-out networks."""
    from moec.targets import topology

    prices = topology.Prices()
    found = [
        topology.fat_tree_2(ports),
        topology.multi_plane_fat_tree_2(ports, planes),
        topology.fat_tree_3(ports),
        topology.slim_fly(ports),
        topology.dragonfly(ports, groups),
    ]
    if as_json:
        rows = [
            {
                "kind": t.kind,
                "endpoints": t.endpoints,
                "switches": t.switches,
                "links": t.all_links,
                "dollars": t.price(prices),
            }
            for t in found
        ]
        print(json.dumps({"topologies": rows}))
        return
    print(f"{'':24}{'endpoints':>10}{'switches':>10}{'links':>10}{'M$':>8}{'k$/endpoint':>13}")
    for t in found:
        dollars = t.price(prices)
        sizes = f"{t.endpoints:10,}{t.switches:10,}{t.all_links:10,}"
        print(f"{t.kind:24}{sizes}{dollars / 1e6:8,.0f}{dollars / t.endpoints / 1e3:13.2f}")
