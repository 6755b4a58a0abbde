"""What can be wrong with a cost row."""

from __future__ import annotations

from moec.errors import InputError


class UnknownOp(InputError):
    """A row whose op the cost model does not know."""

    template = "unknown op {op!r}{hint}"


class WrongRow(InputError):
    """A row with a missing, unknown or impossible value."""

    template = "{op}: {message}"


class WrongRowsFile(InputError):
    """A line of a rows file that is not a row."""

    template = "{file}:{line}: {message}"


class NothingToFit(InputError):
    """Measurements of no family that the fit knows."""

    template = "no row belongs to a family that can be fitted ({families})"


class Uncalibrated(InputError):
    """A target without a number that the cost model needs."""

    template = "{target} has no {parameter}: add it, or borrow another target's numbers with `calibration_from: h100`"
