"""What the command line imports before a command needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moec.cli import _COMMANDS

HEAVY = ("torch", "tvm", "triton", "numpy", "sympy", "scipy", "ortools", "transformers", "rich")
CODE = """
import sys
from moec.cli import main
sys.argv = ["moec", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("loaded:", *(n for n in sys.modules if "." not in n or n.startswith("moec.cli.")))
"""


def loaded(*arguments: str) -> tuple[str, set[str]]:
    """Output of a command, and the modules that it imported."""
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shown, _, names = done.stdout.rpartition("loaded:")
    return shown, set(names.split())


@pytest.mark.parametrize("arguments", [["--help"], ["targets", "list"], ["models", "list"], ["compile", "--help"]])
def test_answers_without_heavy_packages(arguments: list[str]) -> None:
    assert not loaded(*arguments)[1] & set(HEAVY)


def test_help_names_every_command() -> None:
    shown, _ = loaded("--help")
    listed = {line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line.split()}
    assert set(_COMMANDS) <= listed


def test_a_command_imports_no_other() -> None:
    _, names = loaded("models", "list")
    commands = {name.removeprefix("moec.cli.") for name in names} & set(_COMMANDS)
    assert commands == {"models"}
