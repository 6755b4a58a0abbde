"""Opens an artifact folder: manifest, hashes and machine are checked before anything in it is used."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moec.runtime.cuda.program import GpuPlan, parse_gpu_plan
from moec.runtime.errors import (
    MissingFile,
    NeedsRanks,
    NotAnArtifact,
    NotForCpu,
    NotForGpu,
    NoWeights,
    UnreadableFile,
    UnsafePath,
    WrongHash,
)
from moec.runtime.machine import check_machine
from moec.runtime.manifest import Manifest, parse_manifest
from moec.runtime.plan import Plan, parse_plan, stage_of

KERNELS: Final = "kernels/kernels.so"
_NEEDED: Final = ("program.ir", "plan.json")


@dataclass(frozen=True)
class Artifact:
    """An artifact that may run on this machine; `weights` is its safetensors file."""

    path: Path
    manifest: Manifest
    plan: Plan | GpuPlan
    weights: Path
    rank: int = 0

    @property
    def kernels(self) -> Path:
        """The kernel library, of a pipeline that of this rank's stage, as an absolute path."""
        stage = stage_of(self.plan.mesh, self.rank) if isinstance(self.plan, Plan) else 0
        return self.path / (KERNELS if stage == 0 else f"kernels/kernels-{stage}.so")

    def digests(self) -> dict[str, str]:
        """sha256 over the files of program, kernels, weights of all ranks and tokenizer, and of the manifest.

        From the hashes that the manifest lists: what two artifacts differ in.
        """
        parts: dict[str, list[str]] = {"program": [], "kernels": [], "weights": [], "tokenizer": []}
        for name, digest in sorted(self.manifest.files.items()):
            folder = name.partition("/")[0]
            parts[folder if folder in parts else "program"].append(f"{name} {digest}")
        found = {what: hashlib.sha256("\n".join(lines).encode()).hexdigest() for what, lines in parts.items()}
        manifest = (self.path / "manifest.json").read_bytes()
        return {**found, "manifest": hashlib.sha256(manifest).hexdigest()}

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder; it need not exist."""
        return self.path / "tokenizer"


def open_artifact(path: str | Path, check: bool = False, rank: int = 0, ranks: int = 1) -> Artifact:
    """Open the artifact at `path`; the hashes of weights are compared only with `check`, all others always.

    `rank` of `ranks` processes: its part of an artifact that is split over so many.
    Raises an InputError of `moec.runtime.errors` that says what is wrong: no artifact, a file missing or changed,
    another format version, another machine, no weights.
    """
    manifest = read_manifest(path)
    root, shown = Path(path).resolve(), str(path)
    on_cpu = manifest.kind == "cpu"
    if "kernels/kernels.json" not in manifest.files:
        raise NotAnArtifact(path=shown, why="it is a plan only; leave --plan-only away to compile it")
    if on_cpu and KERNELS not in manifest.files:
        raise NotForCpu(path=shown, target=manifest.target)
    if manifest.kind not in ("cpu", "cuda"):
        raise NotForGpu(path=shown, target=manifest.target, kind=manifest.kind)
    if on_cpu:
        check_machine(manifest, shown)
    for name in sorted(manifest.files):
        is_weights = name.startswith("weights/")
        # A rank needs and compares its own weights; those of others may lie on other machines.
        if is_weights and ranks > 1 and f"-{rank:05}." not in name:
            continue
        file = _inside(root, name, shown)
        if not is_weights or check:
            _compare(_hash(file, name, shown), manifest.files[name], name, shown)
    files = _weight_files(manifest)
    if not files:
        raise NoWeights(path=shown)
    if len(files) != ranks:
        raise NeedsRanks(path=shown, ranks=len(files), started=ranks)
    raw, where = (root / "plan.json").read_bytes(), f"{shown}/plan.json"
    plan = parse_plan(raw, where, manifest, rank) if on_cpu else parse_gpu_plan(raw, where, manifest, rank)
    return Artifact(root, manifest, plan, root / sorted(files)[rank], rank)


def read_program(path: str | Path) -> tuple[Path, str]:
    """The file with the final IR of the artifact at `path`, and its text; raises as `open_artifact`.

    For what can be read of an artifact on any machine, and of one that is a plan only.
    """
    manifest = read_manifest(path)
    root, shown = Path(path).resolve(), str(path)
    file = _inside(root, "program.ir", shown)
    _compare(_hash(file, "program.ir", shown), manifest.files["program.ir"], "program.ir", shown)
    return file, file.read_text(encoding="utf-8")


def _weight_files(manifest: Manifest) -> list[str]:
    return [name for name in manifest.files if name.startswith("weights/") and name.endswith(".safetensors")]


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the artifact at `path`, without a look at its other files."""
    root, shown = Path(path), str(path)
    if not root.exists():
        raise NotAnArtifact(path=shown, why="no such folder")
    if not root.is_dir():
        raise NotAnArtifact(path=shown, why="it is a file, an artifact is a folder")
    try:
        raw = (root / "manifest.json").read_bytes()
    except FileNotFoundError:
        raise NotAnArtifact(path=shown, why="it has no manifest.json (`moec compile --out DIR` writes one)") from None
    except OSError as error:
        raise NotAnArtifact(path=shown, why=f"manifest.json: {error.strerror}") from None
    manifest = parse_manifest(raw, shown)
    for name in _NEEDED:
        if name not in manifest.files:
            raise NotAnArtifact(path=shown, why=f"its manifest lists no {name}")
    return manifest


def _inside(root: Path, name: str, shown: str) -> Path:
    """The listed file, which must exist and, after links are followed, lie inside the artifact."""
    try:
        file = (root / name).resolve()
        exists = file.is_file()
    except (OSError, RuntimeError, ValueError):  # a name that no file can have, a circle of links
        exists = False
    if not exists:
        raise MissingFile(path=shown, file=name)
    if not file.is_relative_to(root):
        raise UnsafePath(path=shown, file=name)
    return file


def _hash(file: Path, name: str, shown: str) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UnreadableFile(path=shown, file=name, why=error.strerror) from None


def _compare(found: str, expected: str, name: str, shown: str) -> None:
    if found != expected:
        raise WrongHash(path=shown, file=name, found=found, expected=expected)
