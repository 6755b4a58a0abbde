"""`manifest.json`: what an artifact is, what it needs to run, and the hash of every file in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from moec.runtime.errors import OtherFormat, UnsafePath
from moec.runtime.fields import Fields

FORMAT_VERSION: Final = 1


@dataclass(frozen=True)
class Manifest:
    """The checked content of `manifest.json`; sizes in tokens."""

    moec_version: str
    model: str
    config: dict[str, Any]
    vocab: int
    eos_token_ids: tuple[int, ...]
    target: str
    kind: str
    """cpu, cuda or rocm."""
    arch: str
    """Architecture of the GPU kernels; empty for a CPU, whose needs follow."""
    triple: str
    mcpu: str
    features: tuple[str, ...]
    cores: int
    batch: int
    context: int
    chunk: int
    drafts: int
    """Most tokens that a multi-token-prediction module drafts a step; 0 without one."""
    recipe: str
    files: dict[str, str]  # relative path -> sha256

    @property
    def limits(self) -> dict[str, int]:
        """The sizes that the kernels were compiled for."""
        sizes = {"batch": self.batch, "context": self.context, "chunk": self.chunk}
        return {**sizes, **({"drafts": self.drafts} if self.drafts else {})}


def checksum(data: dict[str, Any]) -> str:
    """sha256 of the manifest without its own `checksum`, as JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in data.items() if key != "checksum"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def parse_manifest(raw: bytes, path: str) -> Manifest:
    """Read and check the manifest of the artifact at `path`.

    Raises MalformedFile for a wrong field, OtherFormat for a version this code does not read, UnsafePath for a file
    outside the artifact.
    """
    fields = Fields.parse(raw, f"{path}/manifest.json")
    version = fields.integer("format_version", 0)
    if version != FORMAT_VERSION:
        advice = "upgrade moec" if version > FORMAT_VERSION else "compile the model again"
        raise OtherFormat(path=path, found=version, known=FORMAT_VERSION, advice=advice)
    if fields.text("checksum") != checksum(fields.data):
        raise fields.problem("checksum", "does not match the content: the manifest was changed after compiling")
    model, target, limits = fields.table("model"), fields.table("target"), fields.table("limits")
    kind = target.text("kind") if "kind" in target.data else "cpu"
    return Manifest(
        moec_version=fields.text("moec_version"),
        model=model.text("name"),
        config=model.table("config").data,
        vocab=model.integer("vocab", 1),
        eos_token_ids=model.integers("eos_token_ids"),
        target=target.text("name"),
        kind=kind,
        arch="" if kind == "cpu" else target.text("arch"),
        triple=target.text("triple") if kind == "cpu" else "",
        mcpu=target.text("mcpu") if kind == "cpu" else "",
        features=target.texts("features") if kind == "cpu" else (),
        cores=target.integer("cores", 1),
        batch=limits.integer("batch", 1),
        context=limits.integer("context", 1),
        chunk=limits.integer("chunk", 1),
        drafts=limits.integer("drafts", 0) if "drafts" in limits.data else 0,
        recipe=fields.text("recipe"),
        files=_files(fields.table("files"), path),
    )


def _files(table: Fields, path: str) -> dict[str, str]:
    for name in table.data:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in name or "\0" in name:
            raise UnsafePath(path=path, file=name)
        digest = table.text(name)
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise table.problem(name, "is no sha256")
    return dict(table.data)
