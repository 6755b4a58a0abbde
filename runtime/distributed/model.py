"""`moec.load` for one of several ranks: each data-parallel replica takes its share of the prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence as List
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moec.errors import InputError, MoecError
from moec.ir.mesh import Mesh
from moec.ir.replicas import Replicas, default_slots
from moec.runtime.artifact import Artifact, open_artifact, read_manifest
from moec.runtime.distributed.collectives import Collectives
from moec.runtime.distributed.engine import DistributedEngine
from moec.runtime.distributed.errors import (
    NoBackend,
    NoStages,
    NotLoaded,
    OtherArtifact,
    OtherRequest,
    RankFailed,
    RankInputFailed,
)
from moec.runtime.distributed.monitor import Monitor
from moec.runtime.distributed.world import World, backend, join
from moec.runtime.draws import Draws
from moec.runtime.engine import Logits
from moec.runtime.generate import Completions, Stream
from moec.runtime.launch import TIMEOUT
from moec.runtime.loads import Loads
from moec.runtime.model import Model
from moec.runtime.plan import Plan
from moec.runtime.sampling import Sampling
from moec.runtime.scheduler import Rates
from moec.runtime.tokens import as_batch

if TYPE_CHECKING:
    from moec.runtime.cuda.ranks import RankEngine

T = TypeVar("T")


def load_distributed(
    path: str | Path,
    check: bool = False,
    threads: int | None = None,
    timeout: float = TIMEOUT,
    micro_batches: int = 1,
) -> DistributedModel:
    """Open this rank's part of the artifact at `path`; every process that torchrun started calls it.

    `micro_batches`: parts of a decode step that the stages of a pipeline have under way at the same time.
    Raises an InputError or MoecError on every rank when one cannot open its part or has another artifact, naming that
    rank, and NoStages for micro-batches without a pipeline.
    """
    # Read before the ranks meet, to know how; what is wrong is told to all once they have.
    artifact, backends = None, "gloo"
    failure: MoecError | None = None
    with suppress(InputError):
        kind = read_manifest(path).kind
        try:
            backends = backend(kind, str(path))
        except NoBackend as error:
            failure = error
    world, store = join(timeout, backends)
    monitor = Monitor(world.rank, world.size, store, timeout, world.progress)
    digests: dict[str, str] = {}
    try:
        if failure is None:
            artifact = open_artifact(path, check, rank=world.rank, ranks=world.size)
            digests = artifact.digests()
    except MoecError as error:
        failure = error
    found_by_all = _told(world, monitor, "the comparison of artifacts", failure, digests)
    for rank, found in enumerate(found_by_all):
        pairs = [(what, found[what], digest) for what, digest in found_by_all[0].items() if found[what] != digest]
        if pairs:
            monitor.close()
            what = ", ".join(f"{what} {other:.12} instead of {own:.12}" for what, other, own in pairs)
            raise OtherArtifact(rank=rank, what=what)
    assert artifact is not None
    model: DistributedModel | None = None
    try:
        model = DistributedModel(artifact, world, monitor, threads)
    except MoecError as error:
        failure = error
    except (MemoryError, OSError) as error:
        failure = NotLoaded(why=getattr(error, "strerror", None) or "the memory does not suffice")
    _told(world, monitor, "the opening of the weights", failure, None)
    assert model is not None
    if micro_batches > 1:
        if world.mesh.pp == 1 or not isinstance(model.engine, DistributedEngine):
            monitor.close()
            raise NoStages(path=str(path))
        model.engine.micro_batches = micro_batches
    return model


def _told(world: World, monitor: Monitor, what: str, failure: MoecError | None, found: T) -> list[T]:
    """What every rank found; raises on every rank when one could not do it, naming that rank."""
    with monitor.communication(what, layer=None):
        told = world.gather((found, str(failure) if failure else "", isinstance(failure, InputError)))
    for rank, (_, message, is_input) in enumerate(told):
        if message:
            monitor.close()
            same = all(other[1] == message for other in told)
            if same and failure is not None:
                raise failure
            raise (RankInputFailed if is_input else RankFailed)(rank=rank, message=message)
    return [found for found, _, _ in told]


class DistributedModel(Model):
    """A rank of a loaded artifact. All ranks make the same calls with the same arguments and get the same results."""

    engine: DistributedEngine | RankEngine

    def __init__(
        self, artifact: Artifact, world: World, monitor: Monitor, threads: int | None, library: Any = None
    ) -> None:
        """`library` stands in for the driver library of a GPU in tests."""
        self.world = world
        self.monitor = monitor
        mesh = artifact.plan.mesh
        world.lay_out(Mesh(mesh.pp, mesh.dp, mesh.tp, mesh.ep))
        if not isinstance(artifact.plan, Plan):
            from moec.runtime.cuda.ranks import RankEngine

            super().__init__(artifact, threads, RankEngine(artifact, world, monitor, library))
            return

        def replicas(layer: int, attrs: dict[str, Any]) -> Replicas:
            key = layer - attrs["first"]
            if key not in cached:
                row = mesh.placement[key] if mesh.placement else default_slots(attrs["experts"], attrs["slots"])
                shares = mesh.shares[key] if mesh.shares else None
                cached[key] = Replicas(tuple(row), attrs["experts"], shares)
            return cached[key]

        cached: dict[int, Replicas] = {}
        self.collectives = Collectives(world, replicas)
        engine = DistributedEngine(artifact, world, self.collectives, monitor, threads)
        super().__init__(artifact, threads, engine)

    @property
    def ranks(self) -> int:
        """Processes that run the model together."""
        return self.world.size

    @property
    def replicas(self) -> int:
        """As `Model.replicas`."""
        return self.world.mesh.dp

    @property
    def replica(self) -> tuple[int, int]:
        """This rank's data-parallel replica, and how many there are."""
        return self.world.mesh.index(self.world.rank, "dp"), self.world.mesh.dp

    def logits(self, ids: Any, chunk: int | None = None) -> Logits:
        """As `Model.logits`: sequence b is computed by replica b mod replicas; every rank gets all."""
        batch = as_batch(ids, self.artifact.manifest)
        replica, replicas = self.replica
        mine = batch[replica::replicas]
        part = super().logits(mine, chunk) if len(mine) else np.empty((0, batch.shape[1], self.vocab), np.float32)
        self._drain()
        result = np.empty((*batch.shape, self.vocab), dtype=np.float32)
        for rank, rows in enumerate(self._gather(part)):
            result[self.world.mesh.index(rank, "dp") :: replicas] = rows
        return result

    def recorded_loads(self) -> Loads:
        """As `Model.recorded_loads`, of all ranks together."""
        assert isinstance(self.engine, DistributedEngine)
        mine = self.engine.recorder.loads() if self.engine.recorder else None
        parts = self._gather(None if mine is None else (mine.layers, mine.loads, mine.coactivation))
        return Loads.joined(Loads(*part) for part in parts if part is not None)

    def losses(self, ids: Any) -> NDArray[np.float64]:
        """As `Model.losses`; one replica computes them, every rank gets them."""
        return self.losses_of([ids])[0]

    def losses_of(self, windows: List[Any]) -> list[NDArray[np.float64]]:
        """As `Model.losses_of`: window i is computed by replica i mod replicas, every rank gets all."""
        replica, replicas = self.replica
        mine = [super(DistributedModel, self).losses(window) for window in windows[replica::replicas]]
        self._drain()
        found: list[NDArray[np.float64]] = [np.empty(0)] * len(windows)
        for rank, some in enumerate(self._gather(mine)):
            found[self.world.mesh.index(rank, "dp") :: replicas] = some
        return found

    def close(self) -> None:
        """Every rank is done: end the watch over the others."""
        self._gather(None)
        self.monitor.close()
        self.world.leave()

    def _complete(
        self, ids: Any, new: int, sampling: Sampling, stop: Iterable[int] | None, stream: Stream | None, drafts: int
    ) -> tuple[bool, Completions]:
        self._check_drafts(drafts)  # artifacts over ranks have no module for it
        replica, replicas = self.replica
        prompts, single = self._prompts(ids, new)
        stop = None if stop is None else tuple(stop)
        self._alike([[list(map(int, prompt)) for prompt in prompts], new, vars(sampling), stop])
        mine = [i for i in range(len(prompts)) if i % replicas == replica]
        if stream is not None and mine:
            given = stream

            def stream(index: int, token: int) -> None:
                given(mine[index], token)  # what it returns is not heard: the ranks would part

        done = self._run(
            prompts[replica::replicas],
            new,
            _Share(**vars(sampling), indices=tuple(mine)),
            stop,
            stream,
        )
        self._drain()
        parts = self._gather((mine, done.tokens, vars(done.rates)))
        tokens: list[list[int]] = [[] for _ in prompts]
        for indices, lists, _ in parts:
            for index, one in zip(indices, lists, strict=True):
                tokens[index] = one
        return single, Completions(tokens, _joined([Rates(**r) for _, _, r in parts], self.world))

    def _alike(self, request: Any) -> None:
        """Raise OtherRequest on every rank when one was asked for something else."""
        digests = self._gather(hashlib.sha256(repr(request).encode()).hexdigest())
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                raise OtherRequest(rank=rank)

    def _drain(self) -> None:
        with self._lock:
            self.engine.use_threads()
            self.engine.drain()

    def _gather(self, value: Any) -> list[Any]:
        with self.monitor.communication("the exchange of results", layer=None):
            return self.world.gather(value)


@dataclass(frozen=True)
class _Share(Sampling):
    """The sampling of some of all sequences: each draws as it would among all."""

    indices: tuple[int, ...] = ()

    def generator(self, sequence: int) -> Draws:
        return super().generator(self.indices[sequence])


def _joined(rates: list[Rates], world: World) -> Rates:
    """Tokens of all replicas over the longest time of any."""
    firsts = [r for rank, r in enumerate(rates) if world.mesh.index(rank, "tp") == world.mesh.index(rank, "pp") == 0]
    return Rates(
        sum(r.prompt_tokens for r in firsts), max(r.prefill_seconds for r in rates),
        sum(r.decoded_tokens for r in firsts), max(r.decode_seconds for r in rates),
    )  # fmt: skip
