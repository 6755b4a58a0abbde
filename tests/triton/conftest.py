"""The worker process that holds Triton's interpreter, shared by all tests of a session."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Without Triton (an installation for CPUs alone) only the launcher is tested.
HERE = Path(__file__).parent
NO_TRITON = importlib.util.find_spec("triton") is None
collect_ignore = [p.name for p in HERE.glob("test_*.py") if NO_TRITON and p.name != "test_cuda_launch.py"]


class Interpreter:
    """Calls functions of worker.py in its process."""

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        worker = [sys.executable, str(Path(__file__).with_name("worker.py"))]
        self.process = subprocess.Popen(
            worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, call: str, **arguments: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the interpreter's process ended with {self.process.poll()}"
        reply = json.loads(line)
        assert "error" not in reply, reply["error"]
        return reply["value"]

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    worker = Interpreter()
    yield worker
    worker.close()
