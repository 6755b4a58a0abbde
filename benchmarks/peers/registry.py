"""The peers by name: how each is called in tables, what it needs, what its weights weigh, how its model is made."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import moec
from moec.errors import InputError, near
from moec.model_defs.deepseek_v3.config import Config
from peers import geometry, runners
from peers.runners import Settings

Make = Callable[[Path, str, bool, int, int], Path]
"""(work folder, model, small, tokens of a sequence, sequences) -> file."""


class UnknownPeer(InputError):
    """A name that `--peers` does not have."""

    template: ClassVar[str] = "no peer {name!r}{hint}"


class MissingPackage(InputError):
    """A peer that is not installed."""

    template: ClassVar[str] = "peer {name} needs {packages}: pip install {packages}"


@dataclass(frozen=True)
class Peer:
    """`bytes_per_weight` of a matrix as stored; `cache_element` of a cached value; (module, package) needed."""

    title: str
    runner: Callable[[Settings], runners.Runner]
    bytes_per_weight: float
    cache_element: int
    make: Make | None = None
    needs: tuple[tuple[str, str], ...] = ()
    bytes_per_expert_weight: float | None = None
    """Of the routed experts' matrices, where they are stored in another way."""

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [package for module, package in self.needs if not installed(module)]


def installed(module: str) -> bool:
    """Whether a top-level module can be imported."""
    return importlib.util.find_spec(module) is not None


def make_artifact(work: Path, model: str, small: bool, context: int, batch: int, recipe: str = "weight-only") -> Path:
    """The artifact of this checkout's compiler: its name holds a hash of the sources, older ones are removed."""
    stem = f"{_name(model, small)}-{recipe}-{context}-{batch}-"
    path = work / f"{stem}{sources()}.moec"
    if not path.exists():
        for old in work.glob(f"{stem}*.moec"):
            shutil.rmtree(old)
        plan = moec.trace(model, geometry.SMALL if small else None).optimize(
            "cpu", context=context, recipe=recipe, chunk=1024, batch=batch
        )
        plan.compile(path, random_weights=0)
    return path


def sources() -> str:
    """A hash of this package's code."""
    digest = hashlib.sha256()
    # Folders of the package may be links, which Path.rglob does not follow.
    for folder, folders, files in os.walk(Path(moec.__file__).parent, followlinks=True):
        folders.sort()
        for name in sorted(f for f in files if f.endswith(".py")):
            digest.update(Path(folder, name).read_bytes())
    return digest.hexdigest()[:12]


def _gguf(fmt: str) -> Make:
    def make(work: Path, model: str, small: bool, context: int, batch: int) -> Path:
        from peers.gguf_model import write

        path = work / f"{_name(model, small)}-{fmt.lower()}.gguf"
        if not path.exists():
            write(path, geometry.source(model, small).config, fmt, seed=0)
        return path

    return make


def _name(model: str, small: bool) -> str:
    """A file name for a model: presets by name, folders by their path's hash as well."""
    path = Path(model)
    digest = f"-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}" if path.is_dir() else ""
    return f"{path.name}{digest}{'-small' if small else ''}"


_LLAMA = (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf"))
_TORCH = (("transformers", "transformers"),)
PEERS = {
    # FP8 with a scale of four bytes for each block of 128 x 128.
    "moec": Peer("moec weight-only", runners.Moec, 1 + 4 / 128**2, 2, make_artifact),
    # Routed experts in 4 bits with a byte for 32 of them; `bytes_per_weight` counts all other matrices as FP8.
    "moec-mxfp4": Peer(
        "moec mxfp4-experts",
        runners.Moec,
        1 + 4 / 128**2,
        2,
        partial(make_artifact, recipe="mxfp4-experts"),
        (),
        17 / 32,
    ),
    # Blocks of 32: a half-precision scale and 32 integers of 8 or of 4 bits.
    "llama-q8": Peer("llama.cpp Q8_0", runners.Llama, 34 / 32, 2, _gguf("Q8_0"), _LLAMA),
    "llama-q4": Peer("llama.cpp Q4_0", runners.Llama, 18 / 32, 2, _gguf("Q4_0"), _LLAMA),
    "transformers": Peer("transformers fp32", runners.Transformers, 4.0, 4, needs=_TORCH),
    "transformers-compile": Peer("torch.compile fp32", runners.TransformersCompiled, 4.0, 4, needs=_TORCH),
    "transformers-bf16": Peer("transformers bf16", runners.TransformersBf16, 2.0, 2, needs=_TORCH),
}


def chosen(names: str | None) -> list[str]:
    """The peers of a comma-separated list, or all that are installed; raises UnknownPeer or MissingPackage."""
    if names is None:
        return [name for name, peer in PEERS.items() if not peer.missing()]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in PEERS:
            raise UnknownPeer(name=name, hint=near(name, list(PEERS)))
        if missing := PEERS[name].missing():
            raise MissingPackage(name=name, packages=" ".join(missing))
    return wanted


class NoArtifact(InputError):
    """An --artifact that names no compiled artifact of a peer."""

    template: ClassVar[str] = "--artifact {text}: expected NAME=FOLDER with a name of {names} and a compiled artifact"


def artifacts(given: list[str], names: list[str] | None = None) -> dict[str, str]:
    """Name -> folder of every `NAME=FOLDER`, a name of this project's peers by default; raises NoArtifact."""
    found = {}
    for text in given:
        name, _, folder = text.partition("=")
        ours = names or [n for n, peer in PEERS.items() if peer.runner is runners.Moec]
        if name not in ours or not Path(folder, "manifest.json").is_file():
            raise NoArtifact(text=text, names=", ".join(ours))
        found[name] = folder
    return found


def weight_bytes(peer: Peer, c: Config) -> float:
    """Bytes of all weights as the peer stores them."""
    return sum(
        t.size * geometry.stored(t, peer.bytes_per_weight, peer.bytes_per_expert_weight) for t in geometry.tensors(c)
    )
