"""What installed packages add, by entry point group: `moec.ops`, `moec.passes`, `moec.targets`, `moec.models`,
`moec.cpu_kernels`, `moec.gpu_kernels`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from importlib.metadata import entry_points
from typing import Any, ClassVar

from moec.errors import InputError, printable


class BrokenPlugin(InputError):
    """An entry point of an installed package that cannot be used."""

    template: ClassVar[str] = "the installed package {package} adds {name!r} to {group}: {message}"


def plugins(group: str, taken: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Name and object of every entry point of `group`, by name; raises BrokenPlugin.

    `taken` are names that exist already: a package adds, it does not replace.
    """
    seen = set(taken)
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        package = entry.dist.name if entry.dist is not None else entry.value

        def fail(message: str, name: str = entry.name, package: str = package) -> BrokenPlugin:
            return BrokenPlugin(package=package, name=name, group=group, message=message)

        if entry.name in seen:
            raise fail("this name exists already")
        seen.add(entry.name)
        try:
            found = entry.load()
        except Exception as error:
            raise fail(f"{entry.value} fails with {type(error).__name__}: {printable(error)}") from None
        yield entry.name, found
