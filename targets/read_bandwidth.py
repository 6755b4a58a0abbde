"""The rate at which this machine's threads read memory: the bound of a step that reads every weight once."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from contextlib import suppress

_SIZE = 256 << 20
_PAUSE = 0.1


class ReadTest:
    """Memory of `size` bytes for each of `threads` threads, in huge pages where the system gives them.

    The reader is libc's memcmp of the two halves: two streams keep more reads under way than one, and no other plain
    reader that was tried is faster.
    """

    def __init__(self, threads: int, size: int = _SIZE) -> None:
        self._half = size // 2
        self._libc = ctypes.CDLL(None)
        self._libc.memcmp.restype = ctypes.c_int
        self._libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        memory = [_private_memory(size) for _ in range(threads)]
        for part in memory:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):
                    part.madvise(mmap.MADV_HUGEPAGE)
            part.write(b"\1" * size)
        self._buffers = [(ctypes.c_char * size).from_buffer(part) for part in memory]

    def run(self) -> float:
        """Bytes a second that the threads read together."""
        start = threading.Barrier(len(self._buffers) + 1)
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []

        def scan(number: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
            if cpus:  # new threads may share one for as long as this takes
                os.sched_setaffinity(0, {cpus[number % len(cpus)]})
            start.wait()
            first = ctypes.addressof(buffer)
            self._libc.memcmp(first, first + self._half, self._half)

        workers = [threading.Thread(target=scan, args=pair) for pair in enumerate(self._buffers)]
        for worker in workers:
            worker.start()
        start.wait()
        began = time.perf_counter()
        for worker in workers:
            worker.join()
        return 2 * self._half * len(workers) / (time.perf_counter() - began)

    def best(self, rounds: int) -> float:
        """The most of several runs, after a pause in which threads that wait for work fall asleep."""
        time.sleep(_PAUSE)
        return max(self.run() for _ in range(rounds))


def measure_read_bandwidth(threads: int, size: int = _SIZE, rounds: int = 3) -> float:
    """Bytes a second: the best of several runs of a `ReadTest`."""
    return ReadTest(threads, size).best(rounds)


def _private_memory(size: int) -> mmap.mmap:
    """Anonymous memory; shared memory, the default, gets no huge pages on Linux."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)
