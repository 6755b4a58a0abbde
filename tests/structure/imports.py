"""The imports of the package as its source files state them, read without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import moec

ROOT = Path(moec.__file__).resolve().parent


@dataclass
class Imports:
    """Names of the modules that one module imports: when it is imported itself, and inside its functions."""

    at_once: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)

    @property
    def all(self) -> set[str]:
        """Both."""
        return self.at_once | self.later


def read_imports() -> dict[str, Imports]:
    """The imports of every module of moec by its name; those for type checkers alone are left out."""
    files = {_name(path): path for path in sources(ROOT)}
    found = {}
    for name, path in files.items():
        found[name] = Imports()
        for node, in_function in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            # The package itself is there whenever one of its modules is; what it gives is imported when it is used.
            names = set(_targets(node, files)) - {name, "moec"}
            (found[name].later if in_function else found[name].at_once).update(names)
    return found


def source(name: str) -> Path:
    """The file of a module, links followed."""
    inside = ROOT.joinpath(*name.split(".")[1:])
    return (inside / "__init__.py" if inside.is_dir() else inside.with_suffix(".py")).resolve()


def reached(start: set[str], edges: dict[str, set[str]]) -> dict[str, str]:
    """Every name that is reached from `start`, with the one that it was reached from."""
    origin = dict.fromkeys(start, "")
    pending = list(start)
    while pending:
        name = pending.pop()
        for other in sorted(edges.get(name, set()) - set(origin)):
            origin[other] = name
            pending.append(other)
    return origin


def chain(name: str, origin: dict[str, str]) -> str:
    """How `name` was reached, for a message."""
    names = [name]
    while origin[names[-1]]:
        names.append(origin[names[-1]])
    return " <- ".join(names)


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of names that reach one another."""
    reach = {name: set(reached(edges[name], edges)) for name in edges}
    groups = {frozenset(o for o in reach[n] if n in reach.get(o, ())) for n in edges if n in reach[n]}
    return sorted(sorted(group) for group in groups)


def sources(folder: Path) -> Iterator[Path]:
    """Python files below a folder; links to folders are followed."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != "__pycache__":
            yield from sources(path)
        elif path.suffix == ".py":
            yield path


def _name(path: Path) -> str:
    return ".".join(("moec", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def _statements(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, in_function
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.orelse:
                yield from _statements(statement, in_function)
        else:
            yield from _statements(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def _targets(node: ast.Import | ast.ImportFrom, modules: dict[str, Path]) -> Iterator[str]:
    """Modules that a statement imports; `from moec.ir import lane16` means the module, where there is one.

    What the package itself gives (`from moec import __version__`) goes by its own name: it is imported when used.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0 and node.module, "imports are absolute"
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        yield inner if inner in modules or node.module == "moec" else node.module
