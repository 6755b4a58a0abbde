"""A shell command that fails on a file, asked whether it fails in the same way on another."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from moec.errors import InputError

ENDED = "ended by the timeout"


class DoesNotFail(InputError):
    """A command that succeeds, or that fails otherwise than asked for, on the module to reduce."""

    template: ClassVar[str] = "the command {message}: nothing to reduce (command: {command})"


@dataclass
class FailingCommand:
    """Runs `command` on texts; `{}` stands for a file with the text, which otherwise is standard input.

    `learn` takes the exit code of the first run as what failing means; with `match`, output must hold that text too.
    """

    command: str
    match: str | None
    timeout: float
    runs: int = 0
    _code: int | str = 0
    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def __enter__(self) -> FailingCommand:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._folder.cleanup()

    def learn(self, text: str) -> None:
        """Run on the whole module; raises DoesNotFail."""
        code, output = self._run(text)
        if code == 0:
            raise DoesNotFail(message="succeeds on the whole module", command=self.command)
        if code in (126, 127):
            raise DoesNotFail(message=f"cannot be run: {output.strip()}", command=self.command)
        if self.match is not None and self.match not in output:
            raise DoesNotFail(message=f"fails without {self.match!r} in its output", command=self.command)
        self._code = code

    def fails(self, text: str) -> bool:
        """Whether the command fails on `text` as it did on the whole module."""
        code, output = self._run(text)
        return code == self._code and (self.match is None or self.match in output)

    def _run(self, text: str) -> tuple[int | str, str]:
        self.runs += 1
        file = Path(self._folder.name) / "module.ir"
        file.write_text(text, encoding="utf-8")
        with file.open() as module, tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            process = subprocess.Popen(
                self.command.replace("{}", str(file)),
                shell=True,
                stdin=subprocess.DEVNULL if "{}" in self.command else module,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | str = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                code = ENDED
            finally:
                # What the shell started in the background ends with it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return code, output.read()
