"""Every option of every command refuses what is no value of its kind, before anything is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from test_documented_commands import commands

from moec.cli import UsageError

NO_NUMBERS = ("", "x", "nine", "1,000", "0x10", "1e", "--")
NO_WHOLE_NUMBERS = (*NO_NUMBERS, "1.5", "1e30", "nan", "inf", "9" * 400, str(1 << 63), str(-(1 << 64)))


def cases() -> Iterator[tuple[str, Any, Any, str]]:
    """(name of the command, command, option, wrong value)."""
    for path, command in commands():
        for param in command.params:
            if param.param_type_name != "option" or param.is_flag:  # type: ignore[attr-defined]
                continue
            kind = str(param.type_descriptor.annotation)  # type: ignore[attr-defined]
            wrong = NO_WHOLE_NUMBERS if "'int'" in kind else NO_NUMBERS if "'float'" in kind else ()
            for value in ("",) if "Path" in kind else wrong:
                yield " ".join(path), command, param, value


@pytest.mark.parametrize("name", sorted({c[0] for c in cases()}))
def test_what_is_no_value_is_refused(name: str) -> None:
    for found, command, param, value in cases():
        if found != name:
            continue
        needed = ["any"] * sum(p.param_type_name == "argument" for p in command.params)
        for other in command.params:
            if other.required and other is not param and other.param_type_name == "option":
                needed += [other.opts[0], "any"]
        with pytest.raises(UsageError) as refusal:
            command.make_context(name, [*needed, f"{param.opts[0]}={value}"])
        message = refusal.value.format_message()
        assert param.opts[0] in message and "\n" not in message, message
