"""What can be wrong with a target name, a target file or a cost row."""

from __future__ import annotations

from moec.errors import InputError


class UnknownTarget(InputError):
    """A name that is neither shipped nor a file."""

    template = "unknown target {name!r}{hint}; a path to a target file (.yaml) works too"


class TargetFileError(InputError):
    """A target file with at least one problem; `moec targets check` lists all of them."""

    template = "{problem}{more}"


class WrongRanks(InputError):
    """A number of ranks that the target's nodes cannot make up."""

    template = "{name}: cannot lay out {ranks} ranks on nodes of {devices} devices: {reason}"


class NoLink(InputError):
    """Communication on a target that has no such link."""

    template = "{name} has no {link} link: add node.{field} to its file, or use fewer ranks"
