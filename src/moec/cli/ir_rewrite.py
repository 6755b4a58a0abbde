"""`moec ir opt` and `moec ir reduce`: run passes on IR text, and shrink a module that makes a command fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moec.cli.arguments import Dp, Ep, Pp, Redundant, Tp
from moec.cli.command import LAYOUT
from moec.cli.ir_text import Batch, Chunk, ContextLength, File, read_module


def opt(
    file: File,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", metavar="SPEC", help="Passes to run, in order; see moec ir passes.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Target.", show_default="the module's own, else cpu")] = None,
    verify: Annotated[str, typer.Option(help="structure, roundtrip or numerics.")] = "structure",
    strict: Annotated[bool, typer.Option("--strict", help="Turn warnings into errors.")] = False,
    dump_ir: Annotated[Path | None, typer.Option(help="Folder for the text after every pass and its report.")] = None,
    batch: Batch = None,
    context: ContextLength = None,
    chunk: Chunk = None,
    ranks: Annotated[
        int | None, typer.Option(help="Devices.", show_default="the mesh's, else the target's", rich_help_panel=LAYOUT)
    ] = None,
    tp: Tp = 1,
    dp: Dp = None,
    ep: Ep = None,
    redundant: Redundant = None,
    pp: Pp = 1,
) -> None:
    """Run passes on IR text and print the result.

    Without passes the text is printed again.
    """
    from moec import targets
    from moec.cli.options import UsageError, check_verify
    from moec.ir import print_module
    from moec.ir.mesh import mesh_of
    from moec.passes.base import Limits
    from moec.passes.laid_out import context_of
    from moec.passes.manager import Manager
    from moec.passes.planning.layout import LayoutRequest
    from moec.passes.registry import parse_pass

    check_verify(verify)
    module = read_module(file)
    steps = [parse_pass(p) for p in passes or []]
    asked = LayoutRequest(ranks, tp, dp, ep, redundant, pp)
    if asked != LayoutRequest() and mesh_of(module).ranks > 1:
        raise UsageError(
            message=f"{file} is sharded already: its mesh says how it lies, leave --ranks and the like away"
        )
    if not steps:
        given = {"target": target, "batch": batch, "context": context, "chunk": chunk, "dump-ir": dump_ir}
        given |= {"verify": verify != "structure" or None, "strict": strict or None}
        given |= {
            k: getattr(asked, k) for k in ("ranks", "tp", "dp", "ep", "redundant", "pp") if asked != LayoutRequest()
        }
        for option in (k for k, v in given.items() if v is not None):
            raise UsageError(message=f"--{option} is for passes: name one with --pass")
        sys.stdout.write(print_module(module))
        return
    name = target or str(module.attrs.get("target", "cpu"))
    limits = Limits(batch or 1, context or 4096, chunk or 256)
    manager = Manager(context_of(module, targets.load(name), limits, asked), verify, strict, dump_ir)
    manager.run(module, steps, [step.name for step in steps])
    for record in manager.records:
        for line in [*record.notes, *(f"warning: {w}" for w in record.warnings)]:
            print(f"moec: {record.name}: {line}", file=sys.stderr)
    sys.stdout.write(print_module(module))


def reduce(
    file: File,
    run: Annotated[str, typer.Option(metavar="COMMAND", help="Shell command that fails; {} is the file to try.")],
    match: Annotated[str | None, typer.Option(help="Text that the failing command's output must hold.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which a run is ended.")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="File for the small module instead of stdout.")] = None,
) -> None:
    """Shrink a module that makes a command fail.

    To a small one that fails in the same way: with the same exit code (a run that is ended by the timeout counts as
    one), and with the text of --match in its output. Without {} in the command the module is its standard input.
    """
    from moec.cli.failing import FailingCommand
    from moec.files import write_whole
    from moec.ir import print_module
    from moec.ir.reduce import reduce

    module = read_module(file)
    with FailingCommand(run, match, timeout) as command:
        command.learn(print_module(module))
        small = reduce(module, command.fails)
    text = print_module(small)
    before, after = (sum(1 for _ in m.ops()) for m in (module, small))
    print(f"moec: {before} -> {after} ops in {len(small.functions)} functions, {command.runs} runs", file=sys.stderr)
    if not after:
        print("moec: warning: the command fails on an empty module too: nothing in it is the cause", file=sys.stderr)
    if out is None:
        sys.stdout.write(text)
    else:
        write_whole(out, text)
