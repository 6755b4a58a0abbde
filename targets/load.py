"""From a name or path to a Target: follows `extends`, sees that nothing is missing, builds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, cast

from moec.errors import near
from moec.plugins import plugins
from moec.targets.document import Document, Leaf, Problem, borrowed, read
from moec.targets.errors import TargetFileError, UnknownTarget
from moec.targets.fields import ELEMENT_TYPES, FIELDS, TOGETHER
from moec.targets.parameters import PARAMETERS
from moec.targets.schema import Cluster, Device, Fp8, Kind, Link, Node, Parameter, Target, TopologyChoice

_FOLDER: Final = Path(__file__).parent
_THIS_MACHINE: Final = "this-machine"
_FITTED: Final = {"cpu": "cpu", "cuda": "h100", "rocm": "h100"}
"""By kind the target whose calibration holds, by assumption, where a file has no number of its own."""


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    """Target files by name: the shipped ones, and those of installed packages (entry points `moec.targets`)."""
    found = {path.stem: path for path in _FOLDER.glob("*.yaml")}
    found.update((name, Path(file)) for name, file in plugins("moec.targets", found))
    return found


def names() -> list[str]:
    """The known targets: the shipped ones and those of installed packages."""
    return sorted(_files())


def load(name_or_path: str | Path) -> Target:
    """The target of a shipped name or of a file.

    Raises UnknownTarget (neither a shipped name nor a file) or TargetFileError (with its first problem).
    """
    path, shown = _locate(str(name_or_path))
    target, problems = _build(path, shown)
    if target is None:
        more = f" (and {len(problems) - 1} more: moec targets check {shown})" if len(problems) > 1 else ""
        raise TargetFileError(problem=problems[0], more=more)
    return target


def check(name_or_path: str | Path) -> list[Problem]:
    """Everything wrong with a target file and the files that it extends; empty when it is right.

    Raises UnknownTarget when there is no such target.
    """
    path, shown = _locate(str(name_or_path))
    return _build(path, shown)[1]


def merged_leaves(name_or_path: str | Path) -> dict[str, Leaf]:
    """Every value of a target by its path, from the files it extends too; what is wrong is left out."""
    path, shown = _locate(str(name_or_path))
    return _calibrated(_merge(path, shown, ()).leaves)


def assumed_from(name_or_path: str | Path) -> str | None:
    """The target whose calibration `load` assumes because the file brings no numbers of the cost model at all."""
    path, shown = _locate(str(name_or_path))
    leaves = _merge(path, shown, ()).leaves
    kind = leaves.get("kind")
    return None if kind is None or any(p in PARAMETERS for p in leaves) else _FITTED.get(str(kind.value))


def _locate(text: str) -> tuple[Path, str]:
    if text in _files():
        return _files()[text], _files()[text].name
    path = Path(text)
    if path.is_file():
        return path, text
    if path.suffix in (".yaml", ".yml") or "/" in text:
        raise UnknownTarget(name=text, hint=" (no such file)")
    raise UnknownTarget(name=text, hint=near(text, names()))


@dataclass
class _Merged:
    """A file over the files that it extends."""

    name: str
    leaves: dict[str, Leaf]
    problems: list[Problem] = field(default_factory=list)


def _build(path: Path, shown: str) -> tuple[Target | None, list[Problem]]:
    merged = _merge(path, shown, ())
    if not merged.problems:
        merged.problems.extend(_incomplete(merged, shown))
    if merged.problems:
        return None, merged.problems
    merged.leaves = _calibrated(merged.leaves)
    return _target(merged), []


def _calibrated(leaves: dict[str, Leaf]) -> dict[str, Leaf]:
    """The leaves, and for every number of the cost model that is missing the one of a shipped target of the kind."""
    kind = leaves.get("kind")
    if kind is None or kind.value not in _FITTED or all(path in leaves for path in PARAMETERS):
        return leaves
    name = _FITTED[str(kind.value)]
    path = _FOLDER / f"{name}.yaml"
    return borrowed(_merge(path, path.name, ()).leaves, name) | leaves


def _merge(path: Path, shown: str, above: tuple[tuple[Path, str], ...]) -> _Merged:
    document = read(path, shown)
    trail = (*above, (path.resolve(), shown))
    leaves: dict[str, Leaf] = {}
    for key in ("calibration_from", "extends"):
        if key in document.header:
            leaves |= _parent(key, document, path, trail)
    leaves |= document.leaves
    name = str(document.header["name"].value) if "name" in document.header else path.stem
    return _Merged(name, leaves, document.problems)


def _parent(key: str, document: Document, path: Path, trail: tuple[tuple[Path, str], ...]) -> dict[str, Leaf]:
    """The leaves that `extends` or `calibration_from` brings in; its problems go to `document`."""
    leaf = document.header[key]
    name = str(leaf.value)
    if key == "extends" and name == _THIS_MACHINE:
        from moec.targets.detect import detected_leaves

        return detected_leaves()
    try:
        parent, shown = _locate(name) if name in names() else _locate(str(path.parent / name))
    except UnknownTarget:
        hint = near(name, names())
        document.wrong(leaf.line, key, f"no target or file {name!r}{hint}")
        return {}
    if any(parent.resolve() == seen for seen, _ in trail):
        chain = " -> ".join([*(shown_above for _, shown_above in trail), shown])
        document.wrong(leaf.line, key, f"goes in a circle: {chain}")
        return {}
    merged = _merge(parent, shown, trail)
    document.problems.extend(merged.problems)
    return borrowed(merged.leaves, name) if key == "calibration_from" else merged.leaves


def _incomplete(merged: _Merged, shown: str) -> list[Problem]:
    """What is missing or contradicts itself once all files are merged."""
    leaves = merged.leaves
    problems = [
        Problem(shown, 1, path, f"is missing: {known.doc}")
        for path, known in FIELDS.items()
        if known.required and path not in leaves
    ]
    if not any(f"device.matrix.{t}" in leaves for t in ELEMENT_TYPES):
        problems.append(Problem(shown, 1, "device.matrix", "is missing: give at least one rate, such as bf16"))
    for first, others in TOGETHER:
        if first in leaves:
            problems.extend(
                Problem(leaves[first].file, leaves[first].line, other, f"is missing: {first} is given")
                for other in others
                if other not in leaves
            )
    problems.extend(_contradictions(leaves))
    return problems


def _contradictions(leaves: dict[str, Leaf]) -> list[Problem]:
    problems = []
    fp8, rate = leaves.get("device.fp8.matrix"), leaves.get("device.matrix.fp8")
    if fp8 is not None and fp8.value is True and rate is None:
        problems.append(Problem(fp8.file, fp8.line, "device.fp8.matrix", "is true, but device.matrix.fp8 is missing"))
    if rate is not None and fp8 is not None and fp8.value is False:
        message = "is given, but device.fp8.matrix is false"
        problems.append(Problem(rate.file, rate.line, "device.matrix.fp8", message))
    ranks, devices = leaves.get("cluster.ranks"), leaves.get("node.devices")
    per_node = cast(float, devices.value) if devices else 1.0
    if ranks is not None and cast(float, ranks.value) > per_node:
        total = cast(float, ranks.value)
        if total % per_node:
            message = f"{total:.0f} ranks do not fill nodes of {per_node:.0f} devices"
            problems.append(Problem(ranks.file, ranks.line, "cluster.ranks", message))
        if "node.scale_out.bandwidth" not in leaves:
            message = f"{total:.0f} ranks need more than one node, but node.scale_out is missing"
            problems.append(Problem(ranks.file, ranks.line, "cluster.ranks", message))
    return problems


def _target(merged: _Merged) -> Target:
    leaves = merged.leaves
    given = _Given(leaves)
    return Target(
        name=merged.name,
        kind=cast(Kind, given.text("kind")),
        device=_device(given),
        node=_node(given),
        cluster=_cluster(given),
        description=given.text("description"),
        calibration={
            path: Parameter(cast(float, leaf.value), cast(Any, leaf.kind), leaf.source)
            for path, leaf in leaves.items()
            if path in PARAMETERS
        },
        sources={path: leaf.source for path, leaf in leaves.items() if leaf.source and path in FIELDS},
    )


class _Given:
    """Typed look-up of merged leaves."""

    def __init__(self, leaves: dict[str, Leaf]) -> None:
        self.leaves = leaves

    def number(self, path: str, default: float = 0.0) -> float:
        return cast(float, self.leaves[path].value) if path in self.leaves else default

    def text(self, path: str, default: str = "") -> str:
        return cast(str, self.leaves[path].value) if path in self.leaves else default

    def words(self, path: str) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.leaves[path].value) if path in self.leaves else ()

    def numbers(self, prefix: str) -> dict[str, float]:
        found = (p for p in self.leaves if p.startswith(prefix))
        return {p.removeprefix(prefix): self.number(p) for p in found}


def _device(given: _Given) -> Device:
    return Device(
        model=given.text("device.model"),
        arch=given.text("device.arch"),
        isa=given.words("device.isa"),
        cores=int(given.number("device.cores")),
        clock=given.number("device.clock"),
        vector_bits=int(given.number("device.vector_bits", 128)),
        matrix_rates=given.numbers("device.matrix."),
        vector_rate=given.number("device.vector.fp32"),
        memory_bytes=given.number("device.memory.capacity"),
        memory_bandwidth=given.number("device.memory.bandwidth"),
        cache_bytes=given.numbers("device.cache."),
        shared_bytes=given.number("device.shared"),
        fp8=Fp8(
            matrix=given.leaves["device.fp8.matrix"].value is True,
            formats=given.words("device.fp8.formats"),
            scale_formats=given.words("device.fp8.scale_formats"),
            accumulate_bits=int(given.number("device.fp8.accumulate_bits", 32)),
        ),
        launch_us=given.number("device.launch") * 1e6,
        host_bandwidth=given.number("device.host.bandwidth"),
    )


def _link(given: _Given, prefix: str) -> Link | None:
    if f"{prefix}.bandwidth" not in given.leaves:
        return None
    name = given.text(f"{prefix}.name", prefix.rpartition(".")[2])
    return Link(name, given.number(f"{prefix}.bandwidth"), given.number(f"{prefix}.latency"))


def _node(given: _Given) -> Node:
    return Node(
        devices=int(given.number("node.devices", 1)),
        scale_up=_link(given, "node.scale_up"),
        scale_out=_link(given, "node.scale_out"),
        nics=int(given.number("node.scale_out.nics")),
    )


def _cluster(given: _Given) -> Cluster:
    topology = None
    if kind := given.text("cluster.topology.kind"):
        ports, planes = (int(given.number(f"cluster.topology.{k}", 1)) for k in ("ports", "planes"))
        topology = TopologyChoice(kind, ports, planes)
    return Cluster(int(given.number("cluster.ranks", 1)), topology)
