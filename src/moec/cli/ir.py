"""`moec ir`: look at IR text, check it, and run passes on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from moec.errors import InputError

ir = typer.Typer(no_args_is_help=True, help="Show, check and rewrite IR text.")


class UnreadableFile(InputError):
    """A file that cannot be read as text."""

    template: ClassVar[str] = "{file}: {message}"


class NoFunction(InputError):
    """A function that the module does not have."""

    template: ClassVar[str] = "no function @{name}{hint}"


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(ir, name="ir")


def read_text(file: str) -> str:
    """The text of a file, of an artifact's program, or of stdin for `-`; raises UnreadableFile."""
    if file == "-":
        return sys.stdin.read()
    path = Path(file)
    path = path / "program.ir" if path.is_dir() else path
    try:
        return path.read_text()
    except UnicodeDecodeError:
        raise UnreadableFile(file=path, message="is not text") from None
    except OSError as error:
        raise UnreadableFile(file=path, message=error.strerror or str(error)) from None


File = Annotated[str, typer.Argument(help="IR text, an artifact folder, or - for stdin.")]


@ir.command()
def show(
    file: File,
    function: Annotated[str | None, typer.Option(help="Only this function.")] = None,
    locations: Annotated[bool, typer.Option("--locations", help="Show where each op comes from.")] = False,
) -> None:
    """Print a module or one function."""
    from moec.errors import near
    from moec.ir import parse_module, print_function, print_module

    module = parse_module(read_text(file), file)
    if function is None:
        sys.stdout.write(print_module(module, locations=locations))
        return
    name = function.removeprefix("@")
    if name not in module.functions:
        raise NoFunction(name=name, hint=near(name, list(module.functions)))
    print(print_function(module.functions[name], locations=locations))


@ir.command()
def verify(file: File) -> None:
    """Check a module: every rule of the op table, and that its text prints back to itself."""
    from moec.ir import parse_module, print_module, verify

    module = parse_module(read_text(file), file)
    verify(module)
    text = print_module(module)
    assert print_module(parse_module(text)) == text
    print(f"{file}: ok, {sum(1 for _ in module.ops())} ops in {len(module.functions)} functions")


@ir.command()
def opt(
    file: File,
    passes: Annotated[list[str] | None, typer.Option("--pass", metavar="SPEC", help="Passes to run, in order.")] = None,
    target: Annotated[str | None, typer.Option(help="Target (default: the module's own, else cpu).")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    context: Annotated[int, typer.Option(min=1)] = 4096,
    chunk: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Run passes on IR text and print the result; without passes, print it again."""
    from moec import targets
    from moec.ir import parse_module, print_module
    from moec.passes.base import Context, Limits
    from moec.passes.manager import Manager
    from moec.passes.registry import parse_pass

    module = parse_module(read_text(file), file)
    steps = [parse_pass(p) for p in passes or []]
    name = target or str(module.attrs.get("target", "cpu"))
    manager = Manager(Context(targets.load(name), Limits(batch, context, chunk)))
    manager.run(module, steps)
    for record in manager.records:
        for line in [*record.notes, *(f"warning: {w}" for w in record.warnings)]:
            print(f"moec: {record.name}: {line}", file=sys.stderr)
    sys.stdout.write(print_module(module))
