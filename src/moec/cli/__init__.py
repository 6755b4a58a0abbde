"""The command line: one file a command, each with `register(app)`; heavy imports stay inside the commands."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer

from moec.cli.command import SHORT, Command
from moec.errors import MoecError, printable, shortened

UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]
"""Typer names only this subclass; its parent stands for every wrong option, argument and command."""

_COMMANDS: tuple[str, ...] = (
    "compile", "info", "run", "serve", "tune", "bench", "eval", "export", "quantise", "ir", "models", "targets", "cost",
    "plan", "place", "overlap", "simulate", "doctor",
)  # fmt: skip


def make_app(arguments: Sequence[str]) -> typer.Typer:
    """The command line with the command that `arguments` start with, or with all when they start with none.

    Help is plain text: laying it out with rich takes longer than everything else that `--help` does.
    """
    app = typer.Typer(
        name="moec",
        help="Compile, inspect, retarget and run Mixture-of-Experts language models.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode=None,
        context_settings=SHORT,
    )
    app.callback()(_group)
    for name in arguments[:1] if arguments and arguments[0] in _COMMANDS else _COMMANDS:
        importlib.import_module(f"moec.cli.{name}").register(app)
    commands = list(app.registered_commands)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            group.typer_instance.rich_markup_mode = None
            commands += group.typer_instance.registered_commands
    for command in commands:
        command.cls = Command
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from moec import __version__

        typer.echo(f"moec {__version__}")
        raise typer.Exit


def _group(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Compile, inspect, retarget and run Mixture-of-Experts language models."""


def main() -> None:
    """Entry point of the `moec` command: one line for a wrong input, exit codes 0, 1 and 2."""
    # Terminated or interrupted, a command cleans up and ends with 128 and the signal's number. No KeyboardInterrupt is
    # raised: when one passes through exec() of a text, as dataclasses use it, CPython kills itself with SIGINT at the
    # end, although it was caught. Who ignores interrupts goes on ignoring them.
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files, and texts, that the terminal cannot show
    try:
        code = _run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    raise SystemExit(code)


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _run(arguments: Sequence[str]) -> int:
    # Ranks that torchrun started find the same error, if it is not of one alone: the first of each machine says it.
    says = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        code = make_app(arguments)(standalone_mode=False, prog_name="moec")
        return code if isinstance(code, int) else 0
    except UsageError as error:
        return _wrong_usage(error) if says else error.exit_code
    except MoecError as error:
        if says or not error.found_by_all:
            print(f"moec: error: {shortened(str(error))}", file=sys.stderr)
        return error.exit_code
    except MemoryError as error:
        print(f"moec: error: not enough memory: {str(error) or 'the system gives no more'}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{printable(error.filename)}: " if error.filename else ""
        print(f"moec: error: {shortened(where)}{error.strerror or error}", file=sys.stderr)
        return 1


def _wrong_usage(error: typer.BadParameter) -> int:
    """Print one line for options or arguments that the command does not take; a bare group shows its help instead."""
    message = error.format_message()
    if "\n" in message:
        typer.echo(message)
    else:
        command = error.ctx.command_path if error.ctx else "moec"
        print(f"moec: error: {shortened(printable(message)).rstrip('.')} (see {command} --help)", file=sys.stderr)
    return error.exit_code
