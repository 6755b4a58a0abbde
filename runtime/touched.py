"""How many bytes of weights a call really reads, as the CPU's page tables recorded it (Linux)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

_SELF: Final = Path("/proc/self")


def bytes_read(file: Path, call: Callable[[], object]) -> int | None:
    """Bytes of the memory-mapped `file` on pages that `call` reads; None where the system does not tell.

    `call` should have run before: mapping a page for the first time maps its neighbours too.
    """
    try:
        (_SELF / "clear_refs").write_text("1", encoding="utf-8")
        call()
        lines = (_SELF / "smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    total, inside = 0, False
    for line in lines:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(f" {file}")
        elif inside and line.startswith("Referenced:"):
            total += int(line.split()[1]) << 10
    return total
