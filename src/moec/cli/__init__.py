"""The command line: one file a command, each with `register(app)`; heavy imports stay inside the commands."""

from __future__ import annotations

import importlib
import sys

import typer

from moec.errors import MoecError

_COMMANDS: tuple[str, ...] = (
    "compile", "run", "bench", "eval", "ir", "models", "targets", "cost", "place", "overlap", "doctor",
)  # fmt: skip

app = typer.Typer(
    name="moec",
    help="Compile, inspect, retarget and run Mixture-of-Experts language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _register_all() -> None:
    for name in _COMMANDS:
        importlib.import_module(f"moec.cli.{name}").register(app)


def main() -> None:
    """Entry point of the `moec` command: one line for a wrong input, exit codes 0, 1 and 2."""
    _register_all()
    try:
        app()
    except MoecError as error:
        print(f"moec: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
