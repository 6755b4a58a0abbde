"""The command line: one file a command, each with `register(app)`; heavy imports stay inside the commands."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

import typer

from moec.errors import MoecError, printable

_COMMANDS: tuple[str, ...] = (
    "compile", "run", "bench", "eval", "ir", "models", "targets", "cost", "plan", "place", "overlap", "doctor",
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
    )
    app.callback()(_group)
    for name in arguments[:1] if arguments and arguments[0] in _COMMANDS else _COMMANDS:
        importlib.import_module(f"moec.cli.{name}").register(app)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            group.typer_instance.rich_markup_mode = None
    return app


def _group() -> None:
    """Compile, inspect, retarget and run Mixture-of-Experts language models."""


def main() -> None:
    """Entry point of the `moec` command: one line for a wrong input, exit codes 0, 1 and 2."""
    # A terminated command cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        make_app(sys.argv[1:])()
    except MoecError as error:
        print(f"moec: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        where = f"{printable(error.filename)}: " if error.filename else ""
        print(f"moec: error: {where}{error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from None
