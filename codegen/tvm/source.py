"""The code of a CPU library as text: TVMScript of every kernel to read, LLVM IR and assembly to build from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MAKEFILE = """\
# Builds the library that the artifact holds: make, then link it or load it through TVM's FFI (docs/artifact.md).
CC ?= cc

# LLVM writes DWARF 5; GNU's assembler takes its .file lines only when told so.
kernels.so: kernels.s
\t$(CC) -shared -o $@ -x assembler -Wa,-gdwarf-5 $<
"""


def write_source(script: Any, library: Any, folder: Path) -> None:
    """Write `functions/NAME.py`, `kernels.ll`, `kernels.s` and a Makefile below `folder`, which must exist.

    `script` is the IRModule that `library` was compiled from. Raises OSError.
    """
    (folder / "functions").mkdir()
    for name, function in script.functions.items():
        (folder / "functions" / f"{name.name_hint}.py").write_text(
            function.script(name=name.name_hint) + "\n", encoding="utf-8"
        )
    (folder / "kernels.ll").write_text(library.mod.inspect_source("ll"), encoding="utf-8")
    (folder / "kernels.s").write_text(library.mod.inspect_source("asm"), encoding="utf-8")
    (folder / "Makefile").write_text(_MAKEFILE, encoding="utf-8")
