"""Whether the kernels of an artifact can run on this machine."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path
from typing import Final

from moec.runtime.errors import MissingCpuFeatures, OtherArchitecture
from moec.runtime.manifest import Manifest

_SAME: Final = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
_SYSTEMS: Final = {"linux": "linux", "darwin": "darwin", "macos": "darwin", "windows": "win32"}
_ARCH_PRCTL: Final = 158
_REQUEST_PERMISSION: Final = 0x1023
_TILE_DATA: Final = 18
_CPUINFO: Final = Path("/proc/cpuinfo")


def check_machine(manifest: Manifest, path: str) -> None:
    """Raise OtherArchitecture or MissingCpuFeatures when this machine cannot run the kernels."""
    needed, have = architecture(manifest.triple.split("-")[0]), architecture(platform.machine())
    systems = {system for name, system in _SYSTEMS.items() if name in manifest.triple} or {sys.platform}
    if needed != have or sys.platform not in systems:
        raise OtherArchitecture(path=path, needed=manifest.triple, have=f"{have} {sys.platform}")
    missing = sorted(set(manifest.features) - cpu_features()) if _CPUINFO.exists() else []
    if missing:
        raise MissingCpuFeatures(path=path, missing=", ".join(missing))


def architecture(name: str) -> str:
    """One name for each architecture: x86_64, aarch64, ..."""
    return _SAME.get(name.lower(), name.lower())


def cpu_features() -> frozenset[str]:
    """The flags of the first CPU in /proc/cpuinfo."""
    text = _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def allow_tiles() -> bool:
    """Ask the system for the use of matrix tiles (AMX) in this process, threads to come included; whether it agrees.

    Linux keeps the 8 KiB of tile state away from threads until a process asks, see its x86/xstate documentation.
    """
    if "amx_tile" not in cpu_features() or sys.platform != "linux":
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0
