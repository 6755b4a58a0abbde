"""`moec place`: where the experts go, from recorded loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from moec.cli.command import MACHINE, OUTPUT, QUESTIONS

if TYPE_CHECKING:
    from moec.passes.placement import Problem
    from moec.passes.placement.problem import Floats
    from moec.passes.placement.recordings import Recording
    from moec.passes.placement.summary import Routing

_EXAMPLES = """\
moec place loads.npz --target h800-ep32 --slots-per-device 9 --out placement.json
"""


def register(app: typer.Typer) -> None:
    """Add `moec place`."""
    app.command("place", epilog=_EXAMPLES)(place)


def place(
    loads: Annotated[
        list[Path], typer.Argument(help="Loads [layers, experts]: .npy, .npz or .json; several are added.")
    ],
    target: Annotated[
        str | None, typer.Option(help="Target: number of devices, and devices a node.", rich_help_panel=MACHINE)
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option("--devices", "--ranks", help="Devices.", show_default="the target's", rich_help_panel=MACHINE),
    ] = None,
    devices_per_node: Annotated[
        int | None, typer.Option(help="Devices a node.", show_default="the target's", rich_help_panel=MACHINE)
    ] = None,
    slots_per_device: Annotated[
        int | None, typer.Option(help="Slots a device.", show_default="as few as fit", rich_help_panel=MACHINE)
    ] = None,
    redundant: Annotated[
        int, typer.Option(help="Without --slots-per-device: at least so many redundant slots.", rich_help_panel=MACHINE)
    ] = 0,
    groups: Annotated[
        int, typer.Option(help="Bind this many groups of experts to nodes (1: no groups).", rich_help_panel=QUESTIONS)
    ] = 1,
    shares: Annotated[
        str, typer.Option(help="How replicas share tokens: even or free.", rich_help_panel=QUESTIONS)
    ] = "even",
    weights: Annotated[
        str,
        typer.Option(
            help="How several recordings count: tokens (by their tokens), equal, or factors W1,W2,...",
            rich_help_panel=QUESTIONS,
        ),
    ] = "tokens",
    coactivation: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|none",
            help="Tokens per pair of experts [layers, experts, experts].",
            show_default="as recorded",
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    previous: Annotated[
        Path | None, typer.Option(help="Placement now in use: move as little as possible.", rich_help_panel=QUESTIONS)
    ] = None,
    slack: Annotated[
        float | None,
        typer.Option(
            help="Part of the greatest load that traffic and movement may cost.",
            show_default="0.002",
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Experts a token chooses (for traffic).", rich_help_panel=QUESTIONS)] = 8,
    top_groups: Annotated[
        int, typer.Option(help="Groups a token may use (for traffic, with --groups).", rich_help_panel=QUESTIONS)
    ] = 4,
    exact: Annotated[
        float, typer.Option(help="Seconds a layer for the exact solver (0: off).", rich_help_panel=QUESTIONS)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the search.", rich_help_panel=QUESTIONS)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the placement: .json or .npz.", rich_help_panel=OUTPUT)
    ] = None,
    sglang: Annotated[
        Path | None, typer.Option(help="Write the file for SGLang's --init-expert-location.", rich_help_panel=OUTPUT)
    ] = None,
    dense_layers: Annotated[
        int, typer.Option(help="Leading dense layers of the model (rows of SGLang's file).", rich_help_panel=OUTPUT)
    ] = 0,
    merged: Annotated[
        Path | None, typer.Option(metavar="OUT.npz", help="Write the loads that were placed.", rich_help_panel=OUTPUT)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a page with pictures of balance and traffic.", rich_help_panel=OUTPUT)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Place experts on devices from recorded loads.

    Objectives in this order: the greatest device load; traffic between nodes (with --coactivation); how little moves
    (with --previous).
    """
    from moec.cli.output import check_file
    from moec.errors import near
    from moec.passes.placement import DEFAULT_SLACK, errors, formats
    from moec.passes.placement import place as solve
    from moec.passes.placement.summary import estimate_traffic, summarise, what_redundancy_buys

    if shares not in ("even", "free"):
        raise errors.UnknownChoice(name="--shares", value=shares, hint=near(shares, ["even", "free"]))
    for name, value, least in (("--redundant", redundant, 0), ("--dense-layers", dense_layers, 0), ("--seed", seed, 0)):
        if value < least:
            raise errors.NotPositive(name=name, expected=f"at least {least}", value=value)
    for name, number in (("--slack", DEFAULT_SLACK if slack is None else slack), ("--exact", exact)):
        if not 0 <= number < float("inf"):
            raise errors.NotPositive(name=name, expected="a number of at least 0", value=number)
    for option, file in (("--out", out), ("--sglang", sglang), ("--merged", merged), ("--report", report)):
        check_file(option, file)
    if sglang is not None:
        formats.check_sglang_name(sglang)
    how = cast(Literal["even", "free"], shares)
    recording = _recording(loads, weights)
    problem = _problem(recording.loads, target, devices, devices_per_node, slots_per_device, redundant, groups)
    routing = _routing(problem, top_k, top_groups)
    pairs = _pairs(coactivation, recording, problem)
    before = None
    if previous is not None:
        before = formats.read_placement(
            previous,
            devices=problem.devices,
            experts=problem.experts,
            nodes=problem.nodes,
            dense_layers=dense_layers,
        )
    if exact and problem.bound_to_nodes:
        raise errors.ExactWithGroups()
    if slots_per_device is None:
        _note_slots(problem, redundant)
    result = solve(
        problem,
        shares=how,
        coactivation=pairs,
        previous=before,
        slack=DEFAULT_SLACK if slack is None else slack,
        seed=seed,
    )
    if exact:
        from moec.passes.placement.exact import prove

        result = prove(result, shares=how, seconds=exact)
    traffic = estimate_traffic(problem, result.placement, routing, pairs) if problem.nodes > 1 else None
    figures = summarise(result, traffic=traffic, coactivation=pairs, previous=before)
    if merged is not None:
        recording.save(merged)
    if out is not None:
        formats.write_placement(result.placement, out)
    if sglang is not None:
        if how == "free":
            print(
                "moec: note: SGLang shares tokens evenly among replicas; free shares do not reach it", file=sys.stderr
            )
        formats.write_sglang(result.placement, sglang, dense_layers=dense_layers)
    if report is not None:
        from moec.files import write_whole
        from moec.passes.placement.report import render

        write_whole(report, render(result, traffic, what_redundancy_buys(problem, how)))
    if as_json:
        print(json.dumps(formats.as_dict(result.placement) | figures))
    else:
        _print(figures, [path for path in (merged, out, sglang, report) if path is not None])


def _recording(files: list[Path], weights: str) -> Recording:
    """The recordings of all files as one; says what each counted for."""
    from moec.passes.placement.recordings import merge, read_recording

    recordings = [read_recording(path) for path in files]
    merged, factors = merge(recordings, weights)
    for recording, factor in zip(recordings, factors, strict=True):
        if len(files) > 1:
            tokens = f"{recording.loads.sum(axis=1).mean():,.0f} choices a layer"
            print(f"moec: note: {recording.name}: {tokens}, times {factor:g}", file=sys.stderr)
    return merged


def _pairs(given: str | None, recording: Recording, problem: Problem) -> Floats | None:
    """Co-activation of a file, or of the recordings where all have it and it can matter."""
    from moec.passes.placement import formats

    if given == "none":
        return None
    if given is not None:
        pairs = formats.read_coactivation(Path(given), problem.layers, problem.experts)
        if problem.nodes == 1:
            print("moec: note: one node: --coactivation has no effect", file=sys.stderr)
        return pairs
    if problem.nodes == 1:
        return None
    if recording.coactivation is not None:
        print(
            "moec: note: the recorded co-activation gathers partners on nodes (--coactivation none: balance alone)",
            file=sys.stderr,
        )
    return recording.coactivation


def _problem(
    loads: Floats,
    target: str | None,
    devices: int | None,
    devices_per_node: int | None,
    slots_per_device: int | None,
    redundant: int,
    groups: int,
) -> Problem:
    """The problem that the options describe; what they leave open comes from the target, or is the least that fits."""
    from moec.passes.placement import Problem, errors, smallest_slots

    if target is not None:
        from moec import targets

        machine = targets.load(target)
        devices = machine.cluster.ranks if devices is None else devices
        devices_per_node = machine.node.devices if devices_per_node is None else devices_per_node
    if devices is None:
        raise errors.MissingDevices()
    if devices < 1:
        raise errors.NotPositive(name="--devices", expected="at least 1", value=devices)
    if slots_per_device is None:
        slots_per_device = smallest_slots(loads.shape[1], devices, redundant)
    return Problem.of(
        loads,
        devices=devices,
        slots_per_device=slots_per_device,
        devices_per_node=devices_per_node,
        groups=groups,
    )


def _note_slots(problem: Problem, redundant: int) -> None:
    """Say how many slots were taken where the user left them open."""
    more = f" and {redundant} more" if redundant else ""
    print(
        f"moec: note: {problem.slots_per_device} slots a device, {problem.redundant} of them redundant in all: "
        f"the fewest that hold {problem.experts} experts{more}",
        file=sys.stderr,
    )


def _routing(problem: Problem, top_k: int, top_groups: int) -> Routing:
    from moec.passes.placement import errors
    from moec.passes.placement.summary import Routing

    for name, value in (("--top-k", top_k), ("--top-groups", top_groups)):
        if value < 1:
            raise errors.NotPositive(name=name, expected="at least 1", value=value)
    reachable = min(top_groups, problem.groups) * (problem.experts // problem.groups)
    return Routing(min(top_k, reachable), min(top_groups, problem.groups))


def _print(figures: dict[str, Any], written: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{figures['layers']} layers, {figures['experts']} experts on {figures['devices']} devices "
        f"x {figures['slots_per_device']} slots ({figures['redundant']} redundant), {figures['nodes']} nodes"
    )
    table = Table("", "mean of layers", "worst", "in layer")
    for key, name in (
        ("balance", "greatest load / lower bound"),
        ("over_mean", "greatest load / mean load"),
        ("price_of_groups", "price of binding groups to nodes"),
    ):
        if figures[key] is not None:
            values = figures[key]
            table.add_row(name, f"{values['mean']:.5f}", f"{values['worst']:.5f}", str(values["worst_layer"]))
    console.print(table)
    if "traffic" in figures:
        _print_traffic(console, figures["traffic"])
    if "pairs_on_one_node" in figures:
        console.print(f"co-activated pairs served on one node: {figures['pairs_on_one_node']:.1%}")
    if "moved_slots" in figures:
        total = figures["layers"] * figures["devices"] * figures["slots_per_device"]
        console.print(f"replicas to load that were not there before: {figures['moved_slots']} of {total}")
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)


def _print_traffic(console: Any, traffic: dict[str, Any]) -> None:
    from rich.table import Table

    low, high = traffic["copies_per_token_forwarded"]
    between = f"{high:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
    how = "sampled from the loads" if traffic["sampled"] else "from loads and co-activation"
    console.print(
        f"copies of a token that leave its node, per layer ({how}): {traffic['copies_per_token']:.2f}; "
        f"{between} with forwarding inside nodes"
    )
    pairs, forwarded = traffic["between_nodes"], traffic["between_nodes_forwarded"]
    nodes = len(pairs)
    table = Table("copies per 1000 tokens into node", "from each other node", "with forwarding")
    for node in range(nodes):
        other = (node + 1) % nodes
        table.add_row(str(node), f"{1000 * pairs[other][node]:.1f}", f"{1000 * forwarded[other][node]:.1f}")
    console.print(table)
