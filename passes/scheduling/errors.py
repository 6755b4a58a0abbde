"""What can be wrong with a task graph or a schedule: one class per mistake, each message one line."""

from __future__ import annotations

from typing import ClassVar

from moec.errors import InputError, MoecError


class UnreadableTasks(InputError):
    """The file is missing, is a folder, may not be read or is not UTF-8 text."""

    template = "{path}: cannot read the task graph: {reason}"


class BadJson(InputError):
    """The text is not JSON; line and column count from 1."""

    template = "{path}: line {line}, column {column}: not JSON: {reason}"


class BadField(InputError):
    """A field is missing or has the wrong type or value."""

    template = "{where}: expected {expected}, got {got}"


class UnknownField(InputError):
    """A key that the form does not have, most often a slip of the pen."""

    template = "{where}: unknown field {field!r}{hint}"


class DuplicateName(InputError):
    """Two tasks of one name, or one key twice in an object."""

    template = "{where}: the name {name!r} is used twice; rename or remove one"


class UnknownTask(InputError):
    """An edge names a task that the graph does not have."""

    template = "{where}: no task is named {name!r}{hint}"


class UnknownResource(InputError):
    """A task uses, or the graph classifies, a resource that is not declared."""

    template = "{where}: no resource is named {name!r}{hint}"


class OverCapacity(InputError):
    """A task alone needs more of a resource than there is."""

    template = "{where}: uses {use:g} of {resource!r}, capacity {capacity:g}; lower the use or raise the capacity"


class DependencyCycle(InputError):
    """Tasks wait for each other within one iteration: nothing can start."""

    template = "edges: the tasks wait for each other: {cycle}; remove one edge or move it to 'repeat'"


class IllegalSchedule(MoecError):
    """A schedule breaks the graph it claims to schedule; `tasks` names the tasks at fault."""

    template: ClassVar[str] = "illegal schedule: {reason}"
