"""`moec ir`: look at IR text, check it, compare it, and run passes on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from moec.cli.ir_rewrite import opt, reduce
from moec.cli.ir_text import Batch, Chunk, ContextLength, File, Json, read_module
from moec.errors import InputError, MoecError

if TYPE_CHECKING:
    from moec.ir import Function, Module, Op

ir = typer.Typer(no_args_is_help=True, help="Show, check, compare and rewrite IR text.")


class NothingShown(InputError):
    """A filter that no function or op passes."""

    template: ClassVar[str] = "no {what} {name}{hint}"


class NotTheSame(MoecError):
    """A module whose printed text parses to another."""

    template: ClassVar[str] = "{file}: the printed module does not parse back to itself"


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(ir, name="ir")


@ir.command(epilog="moec ir show tiny.moec --function dense_layers.decode --cost --target h800")
def show(
    file: File,
    function: Annotated[str | None, typer.Option(help="Only this function.")] = None,
    op: Annotated[str | None, typer.Option(help="Only ops of this name, or of this group (attn, moe, ...).")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Only functions that this layer runs.")] = None,
    locations: Annotated[bool, typer.Option("--locations", help="Show where each op comes from.")] = False,
    cost: Annotated[bool, typer.Option("--cost", help="Show operations and bytes of each op.")] = False,
    target: Annotated[
        str | None, typer.Option(help="With --cost: predicted time and bound of each op on one device of this target.")
    ] = None,
    batch: Batch = None,
    context: ContextLength = None,
    chunk: Chunk = None,
) -> None:
    """Print a module, or the functions and ops that pass all filters."""
    from moec.cli.options import UsageError
    from moec.ir import print_function, print_module, print_op

    if not cost and (idle := {"target": target, "batch": batch, "context": context, "chunk": chunk}):
        for option in (k for k, v in idle.items() if v is not None):
            raise UsageError(message=f"--{option} says what --cost counts for: pass both")
    module = read_module(file)
    if function is None and op is None and layer is None and not cost:
        sys.stdout.write(print_module(module, locations=locations))
        return
    functions = _chosen(module, function, layer)
    if op is None and not cost:
        print("\n".join(print_function(f, locations=locations) for f in functions))
        return
    shown = 0
    told = _costs(module, target, batch or 1, context or 4096, chunk or 256) if cost else {}
    for f in functions:
        ops = [o for o in f.ops if op is None or o.name == op or o.name.startswith(f"{op}.")]
        shown += len(ops)
        if ops:
            print(f"@{f.name}")
        for o in ops:
            print(f"  {print_op(o, locations=locations)}{f'  // {told[o]}' if cost else ''}")
    if not shown and op is not None:
        from moec.errors import near

        known = sorted({o.name for f in functions for o in f.ops})
        raise NothingShown(what="op", name=op, hint=near(op, known))


def _costs(module: Module, target: str | None, batch: int, context: int, chunk: int) -> dict[Op, str]:
    """What each op counts, and takes on a target."""
    from moec import targets
    from moec.ir.cost import op_cost, phase_sizes
    from moec.passes.base import Limits
    from moec.passes.laid_out import context_of
    from moec.passes.op_times import op_times

    told: dict[Op, str] = {}
    for f, op in module.ops():
        parts = int(str(f.attrs.get("micro_batches", 1)))
        told[op] = str(op_cost(op, phase_sizes(str(f.attrs.get("phase", "")), batch, context, chunk, parts)))
    if target is None:
        return told
    for time in op_times(module, context_of(module, targets.load(target), Limits(batch, context, chunk))):
        told[time.op] = f"{time}; {told[time.op]}"
    return told


def _chosen(module: Module, function: str | None, layer: int | None) -> list[Function]:
    from moec.errors import near
    from moec.ir.issue import CALLS

    functions = list(module.functions.values())
    if function is not None:
        name = function.removeprefix("@")
        functions = [f for f in functions if f.name == name]
        if not functions:
            raise NothingShown(what="function", name=f"@{name}", hint=near(name, list(module.functions)))
    if layer is not None:
        layers: dict[str, set[int]] = {}
        for _, o in module.ops():
            if o.name in CALLS:
                first, last = (int(str(o.attrs.get(key, o.attrs.get("layer")))) for key in ("first", "last"))
                layers.setdefault(str(o.attrs["func"]), set()).update(range(first, last + 1))
        functions = [f for f in functions if layer in layers.get(f.name, ())]
        if not functions:
            last = max((max(numbers) for numbers in layers.values()), default=-1)
            raise NothingShown(what="layer", name=str(layer), hint=f" (layers 0 to {last})" if last >= 0 else "")
    return functions


@ir.command()
def verify(file: File) -> None:
    """Check a module by every rule of the op table.

    And that its text prints back to itself.
    """
    from moec.ir import parse_module, print_module, verify

    module = read_module(file)
    verify(module)
    text = print_module(module)
    if print_module(parse_module(text)) != text:
        raise NotTheSame(file=file)
    print(f"{file}: ok, {sum(1 for _ in module.ops())} ops in {len(module.functions)} functions")


@ir.command(epilog="moec ir diff dumps/02_bind-limits.ir dumps/03_mla-absorb.ir")
def diff(
    before: Annotated[str, typer.Argument(help="IR text, an artifact folder, or - for stdin.")],
    after: Annotated[str, typer.Argument(help="The other module.")],
    as_json: Json = False,
) -> None:
    """Compare two modules by structure.

    Functions by name, ops by what they compute, never by line or value name.
    Exit code 0 when they are equal, 1 when they differ.
    """
    from moec.ir.diff import diff

    changes = diff(read_module(before), read_module(after))
    if as_json:
        print(json.dumps({"equal": not changes, "changes": [vars(c) for c in changes]}))
    else:
        print("\n".join(map(str, changes)) or "equal")
    if changes:
        raise typer.Exit(1)


@ir.command(epilog="moec ir stats tiny.moec --quantisation")
def stats(
    file: File,
    as_json: Json = False,
    quantisation: Annotated[
        bool, typer.Option("--quantisation", help="Measure what the number formats cost, worst first.")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of safetensors, for --quantisation.", show_default="random ones")
    ] = None,
    points: Annotated[
        int | None,
        typer.Option(min=1, help="Layers and experts of a weight to measure, evenly spaced.", show_default="4"),
    ] = None,
) -> None:
    """Count ops, parameters and bytes of weights.

    Ops by function and kind, weights by how they are stored.
    """
    from moec.cli.options import UsageError
    from moec.ir.stats import statistics

    module = read_module(file)
    if quantisation:
        _quantisation(module, weights, points or 4, as_json)
        return
    for option, value in (("weights", weights), ("points", points)):
        if value is not None:
            raise UsageError(message=f"--{option} says what --quantisation measures: pass both")
    found = statistics(module)
    if as_json:
        print(json.dumps(found))
        return
    if found["ranks"] == 1:
        told = f"{found['active_parameters']:,} touched by a token"
    else:
        told = f"on each of {found['ranks']} ranks"
    print(f"@{found['module']}: {found['parameters']:,} parameters, {told}")
    for name, count in found["weight_bytes"].items():
        print(f"  {count:>20,} bytes of {name}")
    for name, ops in found["functions"].items():
        kinds = ", ".join(f"{n} {kind}" for kind, n in ops.items())
        print(f"  @{name}: {sum(ops.values())} ops ({kinds})")


def _quantisation(module: Module, weights: Path | None, points: int, as_json: bool) -> None:
    """Noise of stored weights and of products with Gaussian rows, worst products first."""
    from moec.frontend.checkpoint import RandomWeights, bind, open_checkpoint
    from moec.ir.accounting import measure

    if weights is None:
        print("moec: weights are random; --weights FOLDER measures a checkpoint", file=sys.stderr)
        loader = RandomWeights(0).load
    else:
        checkpoint = open_checkpoint(weights)
        bind(module, checkpoint)
        loader = checkpoint.load
    found = [noise.as_json() for noise in measure(module, loader, points)]
    if as_json:
        print(json.dumps({"module": module.name, "quantisation": found}))
        return
    print(f"@{module.name}: signal to noise in dB, of the stored weight and of its product with Gaussian rows,")
    print("worst products first\n  weight  product")
    for n in found:
        point = ", ".join(map(str, n["point"]))
        ratios = "  ".join(
            f"{'exact' if n[k] is None else format(n[k], '.2f'):>6}" for k in ("weight_db", "product_db")
        )
        print(f"  {ratios}  @{n['weight']}[{point}] {n['stored']}, input {n['input']}")


@ir.command("passes")
def list_passes(as_json: Json = False) -> None:
    """List the passes and their options.

    `--pass name{option=value,...}` of `moec compile` and `moec ir opt` takes them.
    """
    from moec.passes.registry import described

    found = described()
    if as_json:
        rows = [
            {
                "name": p.name,
                "does": p.does,
                "options": {o: {"type": t, "default": d} for o, (t, d) in p.options.items()},
            }
            for p in found
        ]
        print(json.dumps({"passes": rows}))
        return
    for p in found:
        print(f"{p.name}\n  {p.does}")
        if p.options:
            print(f"  {{{', '.join(f'{option}={default}' for option, (_, default) in p.options.items())}}}")


@ir.command()
def reference(
    write: Annotated[Path | None, typer.Option(help="Write the page to this file instead of stdout.")] = None,
) -> None:
    """The reference of the IR, made from the op table."""
    from moec.files import write_whole
    from moec.ir.reference import reference

    if write is None:
        sys.stdout.write(reference())
    else:
        write_whole(write, reference())


ir.command(epilog="moec ir opt dumps/02_bind-limits.ir --pass 'mla-absorb{decode=plain}' | moec ir verify -")(opt)
ir.command(epilog="moec ir reduce bad.ir --run 'moec ir verify {}' --out small.ir")(reduce)
