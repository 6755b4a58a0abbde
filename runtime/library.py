"""The native side: TVM's runtime library and the kernels of an artifact, without the compiler and without torch."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from moec.runtime.errors import KernelsDoNotLoad, NoRuntimeLibrary, WrongOption
from moec.runtime.machine import allow_tiles


def default_threads() -> int:
    """`TVM_NUM_THREADS` when it is set to a number, else the CPUs that this process may use."""
    asked = os.environ.get("TVM_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else usable_cpus()


def usable_cpus() -> int:
    """CPUs in this process's affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_MOST_THREADS: Final = 1024


class Library:
    """The functions of one kernel library, run by `threads` threads."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Load the library at the absolute `path`.

        Raises WrongOption for threads that are not 1 to 1024, NoRuntimeLibrary, or KernelsDoNotLoad.
        """
        if threads is not None and not 1 <= threads <= _MOST_THREADS:
            raise WrongOption(option="threads", expected=f"from 1 to {_MOST_THREADS}", value=threads)
        self.threads = threads or default_threads()
        allow_tiles()
        self._ffi = load_runtime()
        self._path = path
        try:
            self._module = self._ffi.load_module(str(path))
        except (RuntimeError, ValueError, OSError) as error:
            raise KernelsDoNotLoad(file=path, why=_first_line(error)) from None
        self._configure = self._ffi.get_global_func("runtime.config_threadpool")

    def function(self, name: str) -> Callable[..., Any]:
        """The exported function `name`; raises KernelsDoNotLoad when there is none."""
        try:
            return self._module.get_function(name)  # type: ignore[no-any-return]
        except AttributeError:
            raise KernelsDoNotLoad(file=self._path, why=f"it has no function {name}") from None

    def tensor(self, array: Any) -> Any:
        """The kernels' view of a contiguous numpy array; it shares the memory and keeps the array alive."""
        return self._ffi.from_dlpack(array)

    def use_threads(self) -> None:
        """Give the calling thread's pool this library's number of threads. TVM keeps one pool a calling thread."""
        self._configure(1, self.threads)


@cache
def load_runtime() -> ModuleType:
    """The `tvm_ffi` module, after TVM's runtime library is in the process; raises NoRuntimeLibrary."""
    # TVM's pool is as large as this says when it starts and can only shrink later; its default is half the CPUs.
    os.environ.setdefault("TVM_NUM_THREADS", str(usable_cpus()))
    # TVM binds threads to the first CPUs of the machine, even those outside the process's affinity mask.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # OpenMP threads of a torch in the same process would spin against TVM's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        ffi = _import_ffi()
        ctypes.CDLL(str(runtime_library()), ctypes.RTLD_GLOBAL)
    except (ImportError, OSError) as error:
        raise NoRuntimeLibrary(why=_first_line(error)) from None
    return ffi


def runtime_library() -> Path:
    """libtvm_runtime beside the installed tvm package, found without importing it; raises ImportError."""
    found = importlib.util.find_spec("tvm")
    for folder in found.submodule_search_locations or [] if found else []:
        for name in ("libtvm_runtime.so", "libtvm_runtime.dylib"):
            if (library := Path(folder) / "lib" / name).is_file():
                return library
    raise ImportError("no libtvm_runtime in an installed tvm package")


def _import_ffi() -> ModuleType:
    """Import tvm_ffi. It imports torch for its own conversions, which costs seconds and serves nothing here."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm_ffi
    finally:
        if hidden:
            del sys.modules["torch"]
    return tvm_ffi  # type: ignore[no-any-return]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
