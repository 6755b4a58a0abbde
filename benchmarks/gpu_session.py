"""A run on a GPU that survives its kernels: stages run in processes of their own, and results are saved row by row.

An illegal address takes the whole CUDA context with it, and a kernel that hangs never comes back. So a stage runs in a
child, which says in a file what it is about to try. When the child dies, or has been at one thing for too long, that
thing is noted as failed and a new child goes on behind it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
SET_UP = "set-up"
LIMITS = {SET_UP: 240.0}
"""Seconds that one thing may take."""
LIMIT = 60.0
LOST = 3
"""Exit code of a child whose context is lost."""
RESTARTS = 12


@dataclass
class Session:
    """One stage of a run, inside its child. `ends`: when no new measurement is begun, as time.time()."""

    out: Path
    stage: str
    arch: str
    jobs: int
    ends: float
    result: dict[str, Any]

    @staticmethod
    def opened(out: Path, stage: str, jobs: int) -> Session:
        """The session that `begin` wrote."""
        result = json.loads(out.read_text())
        return Session(out, stage, result["arch"], jobs, result["ends"], result)

    def late(self) -> bool:
        """Whether no new measurement is begun."""
        return time.time() > self.ends

    def add(self, key: str, value: Any) -> None:
        """Append to a list of the result and save."""
        self.result.setdefault(key, []).append(value)
        save(self.out, self.result)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Try one thing: what it raises is noted, printed and passed over. A lost context ends the process."""
        trying(self.out, self.stage, name)
        try:
            yield
        except Exception as error:
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            note_failure(self.out, self.result, self.stage, name, said)
            if not context_lives():
                sys.exit(LOST)
        else:
            self.add(f"done {self.stage}", name)
        trying(self.out, self.stage, SET_UP)

    def failed(self) -> list[str]:
        """The things of this stage that failed."""
        return failed_in(self.result, self.stage)

    def left(self, named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """The things that no process has tried yet, until time is up."""
        tried = {*self.result.get(f"done {self.stage}", []), *self.failed()}
        waiting = [(name, thing) for name, thing in named if name not in tried]
        for number, (name, thing) in enumerate(waiting):
            if self.late():
                self.add("not reached", f"{self.stage}: {len(waiting) - number} of {len(waiting) + len(tried)}")
                print(f"  {self.stage}: out of time, {len(waiting) - number} things were not tried", flush=True)
                return
            yield name, thing


def context_lives() -> bool:
    """Whether the device still takes work from this process."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def save(out: Path, result: dict[str, Any]) -> None:
    """Write the result whole, or leave the one before."""
    beside = out.with_suffix(".new")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(out)


def failed_in(result: dict[str, Any], stage: str) -> list[str]:
    """The things of a stage that failed."""
    return [f["name"] for f in result.get("failures", []) if f["stage"] == stage]


def note_failure(out: Path, result: dict[str, Any], stage: str, name: str, reason: str) -> None:
    """Add a failure to the result, save it and print it."""
    result.setdefault("failures", []).append({"stage": stage, "name": name, "reason": reason})
    save(out, result)
    print(f"  {stage}: {name}: {reason}", flush=True)


def trying(out: Path, stage: str, name: str) -> None:
    """Say what is about to be tried."""
    beside = out.with_suffix(".trying.new")
    beside.write_text(json.dumps({"stage": stage, "name": name, "began": time.time()}))
    beside.replace(out.with_suffix(".trying"))


def supervise(command: Sequence[str], out: Path, stage: str) -> bool:
    """Run a stage in children until it ends; whether it did. `command` must go on behind what `out` tells of."""
    for _ in range(RESTARTS):
        trying(out, stage, SET_UP)
        child = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        reason = ""
        while child.poll() is None and not reason:
            time.sleep(0.2)
            at = json.loads(out.with_suffix(".trying").read_text())
            limit = LIMITS.get(at["name"], LIMIT)
            if time.time() - at["began"] > limit:
                child.kill()
                reason = f"nothing for {limit:.0f} s: killed"
        code = child.wait()
        if code == 0:
            return True
        result = json.loads(out.read_text())
        at = json.loads(out.with_suffix(".trying").read_text())
        if code != LOST or at["name"] not in failed_in(result, stage):
            died = f"its process ended with {'signal' if code < 0 else 'status'} {abs(code)}"
            note_failure(out, result, stage, at["name"], reason or died)
        if at["name"] == SET_UP or time.time() > result["ends"]:
            return False
    return False
