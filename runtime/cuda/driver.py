"""The few calls of the CUDA driver API that launching needs, through ctypes.

CUDA Driver API reference: module, memory, stream, event and graph management, execution control, tensor maps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, NoReturn

from moec.runtime.cuda.arguments import AlignedBytes, Matrix
from moec.runtime.cuda.errors import (
    BadArguments,
    DriverFailed,
    DriverTooOld,
    NoDevice,
    NoDriver,
    NoHostMemory,
    OutOfMemory,
    OutOfMemoryIn,
)

OUT_OF_MEMORY = 2
NO_BINARY_FOR_GPU = 209
INVALID_IMAGE = 200
UNSUPPORTED_PTX_VERSION = 222
MAX_DYNAMIC_SHARED = 8
REGISTERS = 4
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
L2_PROMOTION_128 = 2
NON_BLOCKING = 1
NO_TIMING = 2
CAPTURE_THREAD = 1
MOST_MAPS = 1 << 16
"""Tensor maps that are kept, of 400 bytes each."""


class Driver:
    """One device through the driver library: its primary context, memory and launches.

    `library` stands in for libcuda in tests. Raises NoDriver, DriverTooOld, NoDevice.
    """

    def __init__(self, ordinal: int = 0, *, minimum: tuple[int, int] = (12, 0), library: Any = None) -> None:
        self.library = library if library is not None else open_library()
        self._maps: dict[tuple[Any, ...], AlignedBytes] = {}
        status = self.library.cuInit(0)
        if status:
            raise NoDriver(reason=self.error_name(status))
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        have = (version.value // 1000, version.value % 1000 // 10)
        self.version = f"{have[0]}.{have[1]}"
        if have < minimum:
            raise DriverTooOld(have=self.version, need=f"{minimum[0]}.{minimum[1]}")
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if ordinal >= count.value:
            raise NoDevice(ordinal=ordinal, count=count.value)
        self.device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(self.device), ordinal)
        self.context = ctypes.c_void_p()
        # The primary context is the one that torch uses: memory and streams are shared with it.
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), self.device)
        self.make_current()
        self.capability = (self.attribute(CAPABILITY_MAJOR), self.attribute(CAPABILITY_MINOR))

    def make_current(self) -> None:
        """Let the calling thread use the device."""
        self.call("cuCtxSetCurrent", self.context)

    def attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value

    def error_name(self, status: int) -> str:
        """The driver's name of a status, `CUDA_ERROR_...`."""
        text = ctypes.c_char_p()
        self.library.cuGetErrorName(status, ctypes.byref(text))
        return text.value.decode() if text.value else f"status {status}"

    def status(self, call: str, *arguments: Any) -> int:
        return int(getattr(self.library, call)(*arguments))

    def call(self, call: str, *arguments: Any) -> None:
        """Raises DriverFailed with the driver's name of the error, OutOfMemoryIn where that is a lack of memory."""
        if status := self.status(call, *arguments):
            self.failed(call, status)

    def failed(self, what: str, status: int) -> NoReturn:
        """Raises DriverFailed or OutOfMemoryIn for a status of `what`."""
        if status == OUT_OF_MEMORY:
            free, total = self.free_memory()
            raise OutOfMemoryIn(call=what, free=free, total=total)
        raise DriverFailed(call=what, error=self.error_name(status))

    def free_memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int, what: str) -> int:
        """The address of `size` bytes for `what`. Raises OutOfMemory with the numbers."""
        address = ctypes.c_uint64()
        status = self.status("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        if status == OUT_OF_MEMORY:
            free, total = self.free_memory()
            raise OutOfMemory(what=what, wanted=size, free=free, total=total)
        if status:
            self.failed("cuMemAlloc", status)
        return address.value

    def release(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def host_memory(self, size: int) -> int:
        """The address of `size` bytes of page-locked host memory, which copies can read while others go on.

        Raises NoHostMemory.
        """
        address = ctypes.c_void_p()
        status = self.status("cuMemAllocHost_v2", ctypes.byref(address), ctypes.c_size_t(size))
        if status == OUT_OF_MEMORY:
            raise NoHostMemory(size=size)
        if status:
            self.failed("cuMemAllocHost", status)
        assert address.value is not None
        return address.value

    def stream(self) -> int:
        """A new stream that does not wait for the default one."""
        stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(NON_BLOCKING))
        return int(stream.value or 0)

    def wait(self, stream: int) -> None:
        """Until everything on a stream has ended."""
        self.call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def event(self, timing: bool = False) -> int:
        """A new event; one with timing costs more to record."""
        event = ctypes.c_void_p()
        self.call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0 if timing else NO_TIMING))
        return int(event.value or 0)

    def elapsed_us(self, start: int, end: int) -> float:
        """Microseconds between two events with timing that have both happened."""
        milliseconds = ctypes.c_float()
        self.call(
            "cuEventElapsedTime", ctypes.byref(milliseconds), ctypes.c_void_p(start), ctypes.c_void_p(end)
        )  # fmt: skip
        return 1e3 * milliseconds.value

    def name(self) -> str:
        """The device's name."""
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, ctypes.c_int(256), self.device)
        return text.value.decode()

    def record(self, event: int, stream: int) -> None:
        """Signal an event once all work so far on a stream has ended."""
        self.call("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def wait_for(self, stream: int, event: int) -> None:
        """Later work on a stream starts after the event."""
        self.call("cuStreamWaitEvent", ctypes.c_void_p(stream), ctypes.c_void_p(event), ctypes.c_uint(0))

    def upload(self, device: int, host: int, size: int, stream: int) -> None:
        """Copy host memory to the device."""
        self.call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(device), ctypes.c_void_p(host), ctypes.c_size_t(size),
            ctypes.c_void_p(stream),
        )  # fmt: skip

    def download(self, host: int, device: int, size: int, stream: int) -> None:
        """Copy device memory to the host."""
        self.call(
            "cuMemcpyDtoHAsync_v2", ctypes.c_void_p(host), ctypes.c_uint64(device), ctypes.c_size_t(size),
            ctypes.c_void_p(stream),
        )  # fmt: skip

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy within the device's memory."""
        self.call(
            "cuMemcpyDtoDAsync_v2", ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size),
            ctypes.c_void_p(stream),
        )  # fmt: skip

    def zero(self, address: int, size: int, stream: int) -> None:
        """Fill device memory with zero bytes."""
        self.call(
            "cuMemsetD8Async", ctypes.c_uint64(address), ctypes.c_ubyte(0), ctypes.c_size_t(size),
            ctypes.c_void_p(stream),
        )  # fmt: skip

    def begin_capture(self, stream: int) -> None:
        """From here on, work on the stream (and on streams that wait for it) is noted instead of done."""
        self.call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), ctypes.c_int(CAPTURE_THREAD))

    def end_capture(self, stream: int) -> int:
        """What was noted, as a graph that `replay` runs."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        self.call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        self.call("cuGraphDestroy", graph)
        return int(ready.value or 0)

    def replay(self, graph: int, stream: int) -> None:
        """Run a captured graph."""
        self.call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def encode(self, meta: Mapping[str, Any], matrix: Matrix) -> AlignedBytes:
        """The tensor map of a matrix, made once: a launch that is packed anew names the same weights again."""
        key = (matrix, *meta["box"], meta["element_bytes"], meta["data_type"], meta["swizzle"])
        if key not in self._maps:
            if len(self._maps) >= MOST_MAPS:
                self._maps.clear()
            self._maps[key] = self._encoded(meta, matrix)
        return self._maps[key]

    def _encoded(self, meta: Mapping[str, Any], matrix: Matrix) -> AlignedBytes:
        """Boxes, type and swizzle as the compiler recorded them; zeros outside."""
        rank = len(matrix.shape)
        if len(meta["box"]) != rank:
            raise BadArguments(name="tensor map", reason=f"{rank} dims, the kernel's box has {len(meta['box'])}")
        width = meta["element_bytes"]
        sizes = (ctypes.c_uint64 * rank)(*reversed(matrix.shape))
        # The driver takes bytes between rows, fastest dim first and left out.
        strides = (ctypes.c_uint64 * max(rank - 1, 1))(*[s * width for s in reversed(matrix.strides[:-1])])
        box = (ctypes.c_uint32 * rank)(*reversed(meta["box"]))
        steps = (ctypes.c_uint32 * rank)(*[1] * rank)
        out = AlignedBytes()
        self.call(
            "cuTensorMapEncodeTiled", ctypes.c_void_p(out.address), meta["data_type"], ctypes.c_uint32(rank),
            ctypes.c_void_p(matrix.address), sizes, strides, box, steps, 0, meta["swizzle"], L2_PROMOTION_128, 0,
        )  # fmt: skip
        return out


def open_library() -> Any:
    """libcuda as the driver installs it. Raises NoDriver."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoDriver(reason=str(error).split(":")[0] + " not found") from None
