"""A model's requests in a thread of their own: they come from any thread, and their tokens go back by queues."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Final

from moec.errors import MoecError
from moec.runtime.model import Model
from moec.runtime.sampling import Sampling
from moec.runtime.scheduler import Request

CLOSED: Final = "the server is closing"


@dataclass(eq=False)
class Job:
    """A prompt to continue. `tokens` gives each new token, then None, or a MoecError that ended it."""

    ids: list[int]
    new_tokens: int
    sampling: Sampling
    ignore_eos: bool = False
    tokens: SimpleQueue[int | MoecError | None] = field(default_factory=SimpleQueue)
    cancelled: bool = False
    """Set it, and the sequence ends with its next token."""


class Worker:
    """Runs a model's `Server`; `submit` from any thread, `close` at the end.

    Requests share the steps of the model as they come (continuous batching); with a seed of its own each draws the same
    tokens whatever runs beside it.
    """

    def __init__(self, model: Model, speculate: int = 0) -> None:
        """Raises WrongOption for `speculate` beyond what was compiled."""
        self._server = model.serve(self._told, speculate)
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._jobs: dict[Request, Job] = {}
        self._closing = False
        self._door = threading.Lock()
        """Held where `_closing` changes and where something is put into the inbox because it has not."""
        self._thread = threading.Thread(target=self._run, name="moec-worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; what is wrong with it comes back by its queue."""
        with self._door:
            if not self._closing:
                self._inbox.put(job)
                return
        job.tokens.put(MoecError(message=CLOSED))

    @property
    def load(self) -> int:
        """Requests that are not finished."""
        return len(self._jobs) + self._inbox.qsize()

    def close(self) -> None:
        """End all that is under way; returns when the thread has ended."""
        with self._door:
            self._closing = True
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._admit()
                if self._server.busy:
                    for request in self._server.step():
                        self._jobs.pop(request).tokens.put(None)
        except MoecError as error:
            self._fail(error)
        except Exception as error:  # a bug: requests must not wait for ever
            self._fail(MoecError(message=f"the model failed: {type(error).__name__}: {error}"))
            raise
        else:
            self._fail(MoecError(message=CLOSED))
        finally:
            self._server.close()

    def _admit(self) -> None:
        """Hand over what has arrived; waits for something where nothing is under way."""
        wait = not self._server.busy
        while True:
            try:
                job = self._inbox.get(block=wait)
            except Empty:
                return
            wait = False
            if job is None:
                return
            try:
                self._jobs[self._submit(job)] = job
            except MoecError as error:
                job.tokens.put(error)

    def _submit(self, job: Job) -> Request:
        options: dict[str, Any] = vars(job.sampling)
        stop = () if job.ignore_eos else None
        return self._server.submit(job.ids, job.new_tokens, **options, stop=stop, place=0)

    def _told(self, request: Request, token: int) -> bool:
        job = self._jobs[request]
        job.tokens.put(token)
        return job.cancelled

    def _fail(self, error: MoecError) -> None:
        with self._door:
            self._closing = True
        for job in self._jobs.values():
            job.tokens.put(error)
        self._jobs.clear()
        while True:
            try:
                left = self._inbox.get_nowait()
            except Empty:
                return
            if left is not None:
                left.tokens.put(error)
