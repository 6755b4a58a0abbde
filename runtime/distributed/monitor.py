"""Watches the other ranks: one that dies or stops answering ends the run on every rank, with one line that names it.

Every rank writes a sign of life and where it stands into the shared store, from a thread of its own, and reads those of
the others. A process that is gone or stopped gives no sign; one that hangs gives signs but stays where it is while the
others wait for it. Whoever finds the cause first writes it down; one rank of each machine prints it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.errors import InputError, MoecError, printable

INTERVAL = 0.25
"""Seconds between signs of life."""
SILENCE = 2.0
"""Seconds without a sign of life after which a rank is taken for dead once a connection broke."""


@dataclass
class _Seen:
    """What was last read of a rank, and when it changed: its sign of life, and its place."""

    beat: str = ""
    beat_at: float = 0.0
    place: str = ""
    place_at: float = 0.0
    process: str = ""


class Monitor:
    """Signs of life of this rank, and what is known of the others. `timeout`: seconds that a rank may stay silent."""

    def __init__(self, rank: int, size: int, store: Any, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self._store = store.clone()
        self._place = (0, "at the start", False)
        self._since = time.monotonic()
        self._number = 0
        self._steps = 0
        self._last = ""
        self._stop = threading.Event()
        self._broken = threading.Event()
        self._asked = threading.Event()
        self._process = _identity(os.getpid())
        self._lock = threading.Lock()
        # Threads that start from here on inherit the mask, so that the watcher takes the signal although the main
        # thread waits in a collective; one that another thread gets must not end the process either.
        signal.signal(signal.SIGTERM, lambda number, frame: self._asked.set())
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self._seen = {r: _Seen(beat_at=self._since, place_at=self._since) for r in range(size) if r != rank}
        self._thread = threading.Thread(target=self._watch, name="moec monitor", daemon=True)
        self._thread.start()

    def begin(self, entry: str) -> None:
        """A call of an entry begins."""
        self._number += 1
        self._steps += 1
        behind = f" behind {self._last}" if self._last else ""
        self._place = (self._number, f"at the start of {entry} (step {self._steps}){behind}", False)

    @contextmanager
    def communication(self, what: str, layer: int | None) -> Iterator[None]:
        """Inside, this rank waits for others; an error of the connection ends the run with its cause."""
        where = what if layer is None else f"layer {layer} ({what})"
        if layer is None and self._last:
            where += f" behind {self._last}"
        self._number += 1
        self._place = (self._number, f"in {where}", True)
        self._since = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            self._broken.set()
            # The watcher finds out who is gone; should nobody be, the error itself is the cause.
            self._thread.join(self.timeout + SILENCE)
            self._end(f"rank {self.rank} lost its peers in {where}: {_first_line(error)}")
        if layer is not None:
            self._last = f"layer {layer} of step {self._steps}"
        self._number += 1
        self._place = (self._number, f"after {where}", False)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Inside, an error of this rank ends the run on all of them."""
        try:
            yield
        except InputError as error:
            # Every rank was given the same input and finds the same.
            self._end(str(error), error.exit_code)
        except MoecError as error:
            self._end(f"rank {self.rank}: {error}", error.exit_code)
        except OSError as error:
            self._end(f"rank {self.rank}: {error.strerror or error}")
        except Exception as error:
            traceback.print_exc()
            self._end(f"rank {self.rank}: {type(error).__name__}: {error}")

    def close(self) -> None:
        """This rank is done: silence from now on means nothing."""
        self._stop.set()
        self._thread.join()
        with suppress(RuntimeError):
            self._store.set(f"life/{self.rank}", "done")

    def _watch(self) -> None:
        beat, asked_to_end = 0, 0.0
        while not self._stop.is_set():
            beat += 1
            try:
                self._step(beat)
            except RuntimeError:
                if self._stop.is_set():
                    return
                self._end(f"rank 0 or the agent that holds the store is gone; this rank stood {self._place[1]}")
            if signal.sigtimedwait({signal.SIGTERM}, INTERVAL) is not None or self._asked.is_set():
                asked_to_end = asked_to_end or time.monotonic()
                self._broken.set()
            # torchrun ends all when one dies: time to find out which.
            if asked_to_end and time.monotonic() - asked_to_end > 2 * SILENCE:
                os._exit(128 + signal.SIGTERM)

    def _step(self, beat: int) -> None:
        number, where, waiting = self._place
        self._store.set(f"life/{self.rank}", f"{beat}|{self._process}|{number}|{int(waiting)}|{where}")
        if self._store.check(["failure"]):
            self._leave(self._store.get("failure").decode())
        now = time.monotonic()
        for rank, seen in self._seen.items():
            key = f"life/{rank}"
            text = self._store.get(key).decode() if self._store.check([key]) else ""
            if text == "done":
                seen.beat = "done"
                continue
            beat_text, _, rest = text.partition("|")
            seen.process, _, place = rest.partition("|")
            if beat_text != seen.beat:
                seen.beat, seen.beat_at = beat_text, now
            if place != seen.place:
                seen.place, seen.place_at = place, now
        self._judge(now)

    def _judge(self, now: float) -> None:
        """End the run when a rank is silent, or when all wait for one that does not move."""
        limit = min(SILENCE, self.timeout) if self._broken.is_set() else self.timeout
        alive = {r: s for r, s in self._seen.items() if s.beat != "done"}
        for rank, seen in alive.items():
            if now - seen.beat_at > limit:
                silent = now - seen.beat_at
                _kill_stopped(seen.process)
                # A dead rank's last sign may be many layers old: who waits for it knows better where it is missed.
                where = f"rank {self.rank} waits {self._place[1]}" if self._place[2] else f"last seen {_place(seen)}"
                self._end(f"rank {rank} died or was stopped: no sign of life for {silent:.1f} s, {where}")
        if not self._place[2] or now - self._since <= self.timeout:
            return
        moving = [r for r, s in alive.items() if s.place.split("|")[1:2] == ["0"]]
        # Opening an artifact may take any time: a rank that is still at the start shows signs of life at least.
        started = [r for r in moving if alive[r].place.split("|")[0] not in ("", "0")]
        stuck = [r for r in started if now - alive[r].place_at > self.timeout]
        if stuck:
            rank = stuck[0]
            waited = now - alive[rank].place_at
            self._end(f"rank {rank} stopped answering {_place(alive[rank])}: others wait for {waited:.1f} s")
        elif not moving:
            lines = sorted({_place(s) for s in alive.values()} | {self._place[1]})
            self._end(f"all ranks wait for each other: {'; '.join(lines)}")

    def _end(self, message: str, code: int = 1) -> None:
        """Write the cause down, unless somebody did, and end this process."""
        text = f"{code} {printable(message)}"
        try:
            first = self._store.compare_set("failure", "", text).decode()
        except RuntimeError:
            first = text
        self._leave(first)

    def _leave(self, failure: str) -> None:
        """Print the cause if this rank is the first of its machine to know, and end."""
        with self._lock:
            code, _, message = failure.partition(" ")
            machine = os.environ.get("GROUP_RANK", "0")
            try:
                says = self._store.add(f"said/{machine}", 1) == 1
            except RuntimeError:
                says = int(os.environ.get("LOCAL_RANK", "0")) == 0
            sys.stdout.flush()
            if says:
                sys.stderr.write(f"moec: error: {message}\n")
                sys.stderr.flush()
            # Whoever holds the store stays until the others have read it.
            time.sleep(3 * INTERVAL)
            os._exit(int(code) if code.isdigit() else 1)


def _place(seen: _Seen) -> str:
    parts = seen.place.split("|", 2)
    return parts[2] if len(parts) == 3 else "at the start"


def _identity(pid: int) -> str:
    """Machine, process id and start time: a later process of the same id is another one."""
    return f"{socket.gethostname()}/{pid}/{_state(pid)[1]}"


def _state(pid: int) -> tuple[str, str]:
    """State letter and start time of a process (proc(5)); empty when there is none or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


def _kill_stopped(process: str) -> None:
    """End a stopped rank of this machine, which cannot end itself."""
    host, _, rest = process.partition("/")
    pid, _, started = rest.partition("/")
    if host == socket.gethostname() and pid.isdigit() and started and _state(int(pid)) == ("T", started):
        with suppress(OSError):
            os.kill(int(pid), signal.SIGKILL)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
