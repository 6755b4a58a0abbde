"""The architectures that kernels are compiled for, with the limits that a compiled kernel is checked against."""

from __future__ import annotations

from dataclasses import dataclass

from moec.codegen.triton.errors import UnknownArchitecture
from moec.errors import near


@dataclass(frozen=True)
class Architecture:
    """`shared_bytes` is the most one block may use (CUDA C++ programming guide, compute capabilities; CDNA3 ISA)."""

    name: str
    backend: str
    version: int | str
    warp_size: int
    shared_bytes: int
    fp8: bool
    tensor_instruction: str

    @property
    def nvidia(self) -> bool:
        return self.backend == "cuda"


_KIB = 1024
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_80", "cuda", 80, 32, 163 * _KIB, False, "mma"),
        Architecture("sm_90a", "cuda", 90, 32, 227 * _KIB, True, "wgmma"),
        Architecture("sm_100a", "cuda", 100, 32, 227 * _KIB, True, "tcgen05"),
        Architecture("gfx942", "hip", "gfx942", 64, 64 * _KIB, True, "mfma"),
    )
}


def architecture(name: str) -> Architecture:
    """The architecture called `name`. Raises UnknownArchitecture with the names that exist."""
    if name not in ARCHITECTURES:
        raise UnknownArchitecture(arch=name, hint=near(name, list(ARCHITECTURES)))
    return ARCHITECTURES[name]
