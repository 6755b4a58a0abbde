"""Kernels of an artifact's `kernels/` folder: loaded from their cubins and launched, without Triton."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moec.runtime.cuda.arguments import Parameters, pack
from moec.runtime.cuda.driver import (
    INVALID_IMAGE,
    MAX_DYNAMIC_SHARED,
    NO_BINARY_FOR_GPU,
    REGISTERS,
    UNSUPPORTED_PTX_VERSION,
    Driver,
)
from moec.runtime.cuda.errors import BadArguments, CubinTooNew, DamagedKernel, WrongArchitecture

# Static shared memory that every kernel may use; more has to be asked for.
PLAIN_SHARED = 48 * 1024
# CUDA C++ programming guide, technical specifications: the same for every compute capability.
LARGEST_GRID = (2**31 - 1, 65535, 65535)


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether a cubin for `arch` runs on a device: sm_90a on 9.0 alone, sm_80 on 8.0 and later 8.x."""
    match = re.fullmatch(r"sm_(\d+)(\d)(a?)", arch)
    if not match:
        return False
    major, minor = int(match[1]), int(match[2])
    if match[3]:
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]


class Kernel:
    """One entry of kernels.json with its cubin, loaded into the driver's context.

    Raises WrongArchitecture, DamagedKernel, CubinTooNew, DriverFailed.
    """

    def __init__(self, driver: Driver, record: Mapping[str, Any], cubin: bytes) -> None:
        self.driver = driver
        self.name = str(record["name"])
        self.shared_bytes = int(record["shared_bytes"])
        self.about: Mapping[str, Any] = record["launch"]
        arch = str(self.about["arch"])
        device = "sm_" + "".join(map(str, driver.capability))
        if not runs_on(arch, driver.capability):
            raise WrongArchitecture(name=self.name, arch=arch, device=device)
        if hashlib.sha256(cubin).hexdigest() != self.about["sha256"]:
            raise DamagedKernel(name=self.name, reason="its cubin does not match its hash")
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        status = driver.status("cuModuleLoadData", ctypes.byref(self.module), cubin)
        if status == NO_BINARY_FOR_GPU:
            raise WrongArchitecture(name=self.name, arch=arch, device=device)
        if status in (INVALID_IMAGE, UNSUPPORTED_PTX_VERSION):
            raise CubinTooNew(name=self.name, have=driver.version)
        if status:
            driver.failed(f"cuModuleLoadData of '{self.name}'", status)
        symbol = str(self.about["symbol"]).encode()
        driver.call("cuModuleGetFunction", ctypes.byref(self.function), self.module, symbol)
        # Asking anything of a function loads it: a lazy driver would do that at the first launch, which may be captured
        # (CUDA programming guide, "Lazy loading").
        driver.call("cuFuncGetAttribute", ctypes.byref(ctypes.c_int()), REGISTERS, self.function)
        if self.shared_bytes > PLAIN_SHARED:
            driver.call("cuFuncSetAttribute", self.function, MAX_DYNAMIC_SHARED, self.shared_bytes)

    def launch(self, grid: tuple[int, ...], arguments: Mapping[str, Any], stream: int = 0) -> None:
        """Puts the kernel on `stream`: addresses (or what has `data_ptr()`), numbers and `Matrix`es by name.

        A grid with an empty axis does nothing. Raises BadArguments, DriverFailed.
        """
        self.bound(grid, arguments)(stream)

    def bound(self, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> Callable[[int], None]:
        """The launch with its parameters packed once: called with a stream, any number of times."""
        if not 1 <= len(grid) <= 3 or any(n < 0 for n in grid):
            raise BadArguments(name=self.name, reason=f"grid {grid} is not one to three sizes")
        if any(n > most for n, most in zip(grid, LARGEST_GRID, strict=False)):
            raise BadArguments(name=self.name, reason=f"grid {grid} is larger than a device takes: {LARGEST_GRID}")
        if self.about["global_scratch"]:
            raise BadArguments(name=self.name, reason="it needs global scratch memory, which this loader gives none")
        if 0 in grid:
            # Nothing to do, and nothing to describe: the driver makes no tensor map of a matrix without rows.
            return lambda stream: None
        packed = pack(
            self.name, self.about["parameters"], self.about["tensor_maps"], arguments, self.driver.encode
        )  # fmt: skip
        x, y, z = (*grid, 1, 1)[:3]
        array = packed.array()

        def start(stream: int, kept: Parameters = packed) -> None:
            # The array points into `kept`, which lives as long as this function.
            self.driver.call(
                "cuLaunchKernel", self.function, x, y, z, self.about["threads"], 1, 1, self.shared_bytes,
                ctypes.c_void_p(stream), array, None,
            )  # fmt: skip

        return start


def load_kernels(folder: Path, driver: Driver) -> dict[str, Kernel]:
    """Every kernel of `folder/kernels.json` by name. Raises DamagedKernel and what Kernel raises."""
    try:
        records = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
        return {r["name"]: Kernel(driver, r, (folder / r["cubin"]).read_bytes()) for r in records}
    except FileNotFoundError as error:
        raise DamagedKernel(name=str(folder), reason=f"{Path(error.filename).name} is missing") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DamagedKernel(name=str(folder), reason=f"kernels.json is not what was written ({error!r})") from None
