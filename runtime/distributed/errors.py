"""What can go wrong between the ranks of a run."""

from __future__ import annotations

from moec.errors import InputError, MoecError


class WrongRankCount(InputError):
    """Another number of processes than the artifact's ranks."""

    template = "the artifact is for {needed} ranks, torchrun started {started}: use --nproc-per-node {needed}"


class OtherArtifact(InputError):
    """Ranks with different artifacts."""

    template = "rank {rank} has another artifact than rank 0: {what} (sha256); give every rank the same one"


class OtherRequest(InputError):
    """Ranks that were started with different arguments."""

    template = "rank {rank} was given other prompts or options of sampling than rank 0: give every rank the same ones"


class RankFailed(MoecError):
    """A rank that could not do its part."""

    template = "rank {rank}: {message}"


class RankInputFailed(RankFailed, InputError):
    """A rank whose input is wrong."""


class NotLoaded(MoecError):
    """A rank whose system did not let it open its weights."""

    template = "cannot open its weights: {why}"


class CannotJoin(MoecError):
    """A rank that could not reach the others, for a reason of its own."""

    template = "rank {rank} cannot join the others: {why}"
    found_by_all = False


class RanksMissing(MoecError):
    """Ranks that never joined."""

    template = "not all of {size} ranks joined within {seconds:g} s ({why})"


class NoBackend(InputError):
    """A GPU artifact where its ranks cannot exchange tensors."""

    template = "{path} is for {kind} devices, whose ranks exchange tensors over NCCL: {why}"


class NoStages(InputError):
    """Micro-batches for ranks that form no pipeline."""

    template = (
        "{path} has no pipeline stages on CPUs for --micro-batches to keep busy: leave it away, or compile with --pp"
    )
