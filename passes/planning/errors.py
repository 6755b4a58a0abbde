"""What can be wrong with a question to the planner."""

from __future__ import annotations

from typing import ClassVar

from moec.errors import InputError


class WrongLayout(InputError):
    """Degrees of parallelism that do not make up the ranks."""

    template: ClassVar[str] = "layout: {message}"


class WrongRedundancy(InputError):
    """Expert slots that do not divide over the devices."""

    template: ClassVar[str] = (
        "{experts} experts and {redundant} redundant ones do not divide over EP {ep}; the smallest that does is "
        "--redundant {proposal} ({slots} slots, {each} a device)"
    )


class CutBlock(InputError):
    """Tensor parallelism that would cut a quantisation block."""

    template: ClassVar[str] = (
        "TP {tp} cuts @{weight}: {width} over {tp} devices is {part}, not a multiple of its {block}-wide scale block; "
        "use {proposal}, a recipe without scale blocks{padding}"
    )


class WrongPlan(InputError):
    """Numbers outside what the model or the planner allows."""

    template: ClassVar[str] = "plan: {message}"


class NothingFits(InputError):
    """A search that finds no layout within its limits."""

    template: ClassVar[str] = (
        "--search: none of {tried} layouts of {model_ranks} devices of {target} holds the model{limit}; "
        "allow more time, more devices (--ranks) or a smaller context"
    )


class WrongWhatIf(InputError):
    """A `--what-if` that names no number of the target, or no value."""

    template: ClassVar[str] = "--what-if {spec}: {message}"
