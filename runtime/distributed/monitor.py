"""Watches the other ranks: one that dies or stops answering ends the run on every rank, with one line that names it.

Every rank writes a sign of life and where it stands into the shared store, from a thread of its own, and reads those of
a few others, of all when something seems wrong. A process that is gone or stopped gives no sign; one that hangs gives
signs but stays where it is while the others wait for its part of an exchange. Whoever finds the cause first writes it
down; one rank of each machine prints it.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moec.errors import InputError, MoecError, printable
from moec.runtime.distributed.progress import Progress, Standing, awaited

INTERVAL = 0.25
"""Seconds between signs of life."""
SILENCE = 2.0
"""Seconds without a sign of life after which a rank is taken for dead once a connection broke."""


@dataclass
class _Seen:
    """What was last read of a rank, and when it changed: its sign of life, and where it stands."""

    beat: str = ""
    beat_at: float = 0.0
    standing: Standing = field(default_factory=Standing)
    standing_at: float = 0.0
    process: str = ""


class Monitor:
    """Signs of life of this rank, and what is known of the others. `timeout`: seconds that a rank may stay silent."""

    def __init__(self, rank: int, size: int, store: Any, timeout: float, progress: Progress) -> None:
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self._store = store.clone()
        self._progress = progress
        self._place = (0, "at the start")
        self._since = time.monotonic()
        self._looked = self._since
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
        self._seen = {r: _Seen(beat_at=self._since, standing_at=self._since) for r in range(size) if r != rank}
        self._thread = threading.Thread(target=self._watch, name="moec monitor", daemon=True)
        self._thread.start()

    def begin(self, entry: str) -> None:
        """A call of an entry begins."""
        self._number += 1
        self._steps += 1
        behind = f" behind {self._last}" if self._last else ""
        self._place = (self._number, f"at the start of {entry} (step {self._steps}){behind}")

    @contextmanager
    def communication(self, what: str, layer: int | None) -> Iterator[None]:
        """Inside, this rank takes part in an exchange; an error of the connection ends the run with its cause."""
        where = what if layer is None else f"layer {layer} ({what}) of step {self._steps}"
        if layer is None and self._last:
            where += f" behind {self._last}"
        self._number += 1
        self._place = (self._number, f"in {where}")
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
        self._place = (self._number, f"after {where}")

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
        own = self._standing()
        self._store.set(f"life/{self.rank}", f"{beat}|{self._process}|{own.text()}")
        if self._store.check(["failure"]):
            self._leave(self._store.get("failure").decode())
        now = time.monotonic()
        # A rank that has not run itself (a machine that slept, a stopped job) knows nothing of that time.
        if now - self._looked > SILENCE:
            self._since += now - self._looked
            for seen in self._seen.values():
                seen.beat_at += now - self._looked
                seen.standing_at += now - self._looked
        self._looked = now
        watched = self._watched(now)
        for rank in watched:
            seen, key = self._seen[rank], f"life/{rank}"
            text = self._store.get(key).decode() if self._store.check([key]) else ""
            if text in ("", "done"):
                seen.beat = text
                continue
            beat_text, seen.process, rest = text.split("|", 2)
            if beat_text != seen.beat:
                seen.beat, seen.beat_at = beat_text, now
            standing = Standing.parse(rest)
            if standing != seen.standing:
                seen.standing, seen.standing_at = standing, now
        self._judge(now, own, {r: self._seen[r] for r in watched if self._seen[r].beat != "done"})

    def _standing(self) -> Standing:
        return Standing(*self._place, dict(self._progress.started), self._progress.waiting)

    def _watched(self, now: float) -> list[int]:
        """The ranks 1, 2, 4, ... further on: few, and each watched by several. All once an answer is late."""
        if self._broken.is_set() or (self._progress.waiting and now - self._since > self.timeout / 2):
            return list(self._seen)
        return sorted({(self.rank + 2**i) % self.size for i in range((self.size - 1).bit_length())})

    def _judge(self, now: float, own: Standing, alive: dict[int, _Seen]) -> None:
        """End the run when a rank is silent, or when this one waits for one that does not move."""
        limit = min(SILENCE, self.timeout) if self._broken.is_set() else self.timeout
        for rank, seen in alive.items():
            if now - seen.beat_at > limit:
                silent = now - seen.beat_at
                _kill_stopped(seen.process)
                # A dead rank's last sign may be many layers old: who waits for it knows better where it is missed.
                where = f"rank {self.rank} waits {own.where}" if own.waiting else f"last seen {seen.standing.where}"
                self._end(f"rank {rank} died or was stopped: no sign of life for {silent:.1f} s, {where}")
        if not own.waiting or now - self._since <= self.timeout:
            return
        standings = {self.rank: own} | {r: s.standing for r, s in alive.items()}
        still = {r for r, s in alive.items() if now - s.standing_at > self.timeout}
        held_up_by = awaited(self.rank, standings)
        # Opening an artifact may take any time: a rank that is still at the start shows signs of life at least.
        stuck = [r for r in held_up_by if r in still and standings[r].number]
        if stuck:
            rank, waited = stuck[0], now - alive[stuck[0]].standing_at
            here = f"rank {self.rank} waits {own.where}"
            self._end(f"rank {rank} stopped answering {standings[rank].where}: {here} for {waited:.1f} s")
        group = {r for w in own.waiting for r in w.ranks if r in alive}
        if not held_up_by and group <= still:
            lines = "; ".join(f"rank {r} {s.where}" for r, s in sorted(standings.items()) if s.waiting)
            if own.lacks(standings):
                self._end(f"ranks wait for each other: {lines}")
            # Where others are further, it is this rank that does not go on: they will say so.
            if all(standings[r].given(w) == w.number for w in own.waiting for r in w.ranks if r in standings):
                self._end(f"every rank has sent its part and none gets through, is the network up? {lines}")

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


def _identity(pid: int) -> str:
    """Machine, process id and start time: a later process of the same id is another one."""
    return f"{socket.gethostname()}/{pid}/{_state(pid)[1]}"


def _state(pid: int) -> tuple[str, str]:
    """State letter and start time of a process (proc(5)); empty when there is none or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
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
