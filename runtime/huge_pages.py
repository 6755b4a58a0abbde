"""Weights in huge pages: a mapped file whose parts are replaced, one by one, by copies in large pages of memory.

Reading gigabytes through 4 KiB pages spends a third of the time on address translation, and most file systems map
nothing larger. A thread copies the file piece by piece into anonymous memory that asks for huge pages and moves each
piece over the mapping's same addresses in one step (Linux `mremap`), so that whoever reads the weights meanwhile sees
the same bytes, before or after. Memory in use grows by one piece: the file's own pages can be reclaimed at any time.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from threading import Event, Thread
from typing import Final

HUGE: Final = 2 << 20
_PIECE: Final = 32 * HUGE
_LEAST: Final = 64 << 20  # what is smaller fits the caches of address translation
_MARGIN: Final = 512 << 20
_SETTING: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_READ, _WRITE = 1, 2
_PRIVATE, _ANONYMOUS = 2, 32
_MAYMOVE, _FIXED = 1, 2
_ADVISE_HUGE: Final = 14


class HugePages:
    """Moves a file, mapped whole at `address`, into huge pages in the background.

    `fd` is a descriptor of the mapped file, which this closes: another file may come to have its name at any time.
    `close` it before the mapping ends.
    """

    def __init__(self, fd: int, address: int, nbytes: int) -> None:
        self._fd = fd
        self._address = address
        self._nbytes = nbytes
        self._stop = Event()
        self._thread = Thread(target=self._run, name="moec-huge-pages", daemon=True)
        self.moved = 0
        """Bytes that are in huge pages so far."""
        self._thread.start()

    def settle(self) -> None:
        """Wait until all is moved."""
        self._thread.join()

    def close(self) -> None:
        """Stop moving; what has been moved stays where it is."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        libc = ctypes.CDLL(None)
        libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        for function in (libc.munmap, libc.madvise, libc.mprotect):
            function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * (function is not libc.munmap)]
        try:
            for start in range(-self._address % HUGE, self._nbytes, _PIECE):
                size = min(_PIECE, -(-(self._nbytes - start) // 4096) * 4096)
                if self._stop.is_set() or not self._move(libc, start, size):
                    return
        finally:
            os.close(self._fd)

    def _move(self, libc: ctypes.CDLL, start: int, size: int) -> bool:
        """One piece; False when the system refuses, and the rest stays mapped from the file."""
        room = libc.mmap(None, size + HUGE, _READ | _WRITE, _PRIVATE | _ANONYMOUS, -1, 0)
        if room in (None, ctypes.c_void_p(-1).value):
            return False
        copy = -(-room // HUGE) * HUGE
        libc.madvise(copy, size, _ADVISE_HUGE)
        view = (ctypes.c_uint8 * size).from_address(copy)
        done, wanted = 0, min(size, self._nbytes - start)
        while done < wanted:
            count = os.preadv(self._fd, [memoryview(view)[done:wanted]], start + done)
            if not count:
                break
            done += count
        whole = done == wanted and libc.mprotect(copy, size, _READ) == 0
        target = self._address + start
        if whole:
            whole = libc.mremap(copy, size, size, _MAYMOVE | _FIXED, target) == target
        # What lies before and behind the aligned part of the room, or all of it.
        if copy > room:
            libc.munmap(room, copy - room)
        if room + HUGE > copy:
            libc.munmap(copy + size, room + HUGE - copy)
        if not whole:
            libc.munmap(copy, size)
        self.moved += size if whole else 0
        return whole


def possible(nbytes: int) -> bool:
    """Whether this system has huge pages on request and room for `nbytes` beside what is in use."""
    if (
        sys.platform != "linux"
        or nbytes < _LEAST
        or not _SETTING.exists()
        or "[never]" in _SETTING.read_text(encoding="utf-8")
    ):
        return False
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 > nbytes + _MARGIN
