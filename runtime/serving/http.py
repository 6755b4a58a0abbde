"""A model over HTTP, in the form of OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models, /health.

Plain HTTP without keys: for this machine, or behind a proxy that has both.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from moec.errors import InputError, MoecError, printable, shortened
from moec.runtime.model import Model
from moec.runtime.serving.api import Answer, OtherModel, Wanted, WrongRequest, parse
from moec.runtime.serving.worker import Job, Worker
from moec.runtime.stop_text import Continuation

LONGEST: Final = 16 << 20
"""Most bytes of a request."""
_PATIENCE: Final = 60.0
"""Seconds that a client may take to say what it wants, or to take an answer."""
_ROUTES: Final = {"/v1/completions": "POST", "/v1/chat/completions": "POST", "/v1/models": "GET", "/health": "GET"}


class PortTaken(MoecError):
    """An address that cannot be listened at."""

    template = "cannot listen at {host}:{port}: {why}"


class HttpServer(ThreadingHTTPServer):
    """Listens at `host`:`port` (0: a free one) for a model that is called `name`. Raises PortTaken."""

    daemon_threads = True

    def __init__(self, model: Model, worker: Worker, name: str, host: str, port: int, log: bool = True) -> None:
        self.model, self.worker, self.model_name, self.log = model, worker, name, log
        self.created = int(time.time())
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise PortTaken(host=host, port=port, why=why) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: HttpServer
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE
    _status = 0
    _told = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            self._answer({"status": "ok", "requests": self.server.worker.load})
        elif path == "/v1/models":
            entry = {
                "id": self.server.model_name,
                "object": "model",
                "created": self.server.created,
                "owned_by": "moec",
            }
            entry["max_model_len"] = self.server.model.context
            self._answer({"object": "list", "data": [entry]})
        else:
            self._no_route(path)

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        if _ROUTES.get(path) != "POST":
            self.close_connection = True  # the body was not read
            self._no_route(path)
            return
        began = time.perf_counter()
        try:
            wanted = parse(self._body(), path.startswith("/v1/chat"), self.server.model, self.server.model_name)
            self._complete(wanted)
        except OtherModel as error:
            self._refuse(404, error)
        except InputError as error:
            self._refuse(400, error)
        except MoecError as error:
            self._refuse(500, error)
        self._note(f"{path} {self._status}{self._told}, {time.perf_counter() - began:.2f} s")

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LONGEST:
            self.close_connection = True
            raise WrongRequest(message=f"Content-Length must be a number of at most {LONGEST} bytes", param=None)
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise WrongRequest(message="the body is not JSON", param=None) from None

    def _complete(self, wanted: Wanted) -> None:
        job = Job(wanted.ids, wanted.new_tokens, wanted.sampling, wanted.ignore_eos)
        answer = Answer(wanted, self.server.model_name)
        said = _Said(self.server.model, wanted)
        self.server.worker.submit(job)
        try:
            # What is wrong with the prompt comes in place of its first token: until then no status is sent.
            item = job.tokens.get()
            if wanted.stream and not isinstance(item, MoecError):
                self._begin_stream(answer)
            while True:
                if isinstance(item, MoecError):
                    raise item
                text = said.finish() if item is None else said.take(item)
                if wanted.stream and (text or not said.has_text):
                    self._event(answer.piece(text, said.fresh()))
                if item is None or said.stopped:
                    break
                item = job.tokens.get()
            self._told = f", {len(wanted.ids)} prompt tokens, {len(said.tokens)} new"
            if wanted.stream:
                for event in answer.end(said.tokens, said.ended):
                    self._event(event)
                self.wfile.write(b"data: [DONE]\n\n")
            else:
                self._answer(answer.whole(said.text, said.tokens, said.ended))
        except MoecError as error:
            if not self._status:
                raise
            self._event(_error(error, "server_error"))
            self._told = f", {error}"
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            self._told = ", the client went away"
        finally:
            job.cancelled = True

    def _begin_stream(self, answer: Answer) -> None:
        self.close_connection = True
        self._head(200, "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in answer.begin():
            self._event(event)

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self._head(status, "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _head(self, status: int, kind: str) -> None:
        self._status = status
        self.send_response(status)
        self.send_header("Content-Type", kind)

    def _refuse(self, status: int, error: MoecError) -> None:
        self._answer(_error(error, "invalid_request_error" if status < 500 else "server_error"), status)
        self._told = f", {shortened(str(error))}"

    def _no_route(self, path: str) -> None:
        known = _ROUTES.get(path)
        what = f"{path} takes {known}" if known else f"there is no {path}: " + ", ".join(_ROUTES)
        self._refuse(405 if known else 404, MoecError(message=what))

    def _note(self, line: str) -> None:
        if self.server.log:
            print(f"moec: {printable(line)}", file=sys.stderr, flush=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are noted when they are done."""


class _Said:
    """What a sequence has said so far: its tokens, and their text where there is a tokenizer."""

    def __init__(self, model: Model, wanted: Wanted) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.has_text = model.has_tokenizer
        self.ended = self.stopped = False
        self._ends = () if wanted.ignore_eos else model.artifact.manifest.eos_token_ids
        self._continuation = Continuation(model.tokenizer.stream(), wanted.stops) if self.has_text else None
        self._shown = 0

    def take(self, token: int) -> str:
        """The text that a token settles; `stopped` when it completes a stop text."""
        self.tokens.append(token)
        self.ended = token in self._ends
        return self._add(self._continuation.push(token) if self._continuation else "")

    def finish(self) -> str:
        """The text that was held back."""
        return self._add(self._continuation.finish() if self._continuation else "")

    def fresh(self) -> list[int]:
        """The tokens since the last call."""
        begin, self._shown = self._shown, len(self.tokens)
        return self.tokens[begin:]

    def _add(self, text: str) -> str:
        self.text += text
        if self._continuation is not None and self._continuation.ended:
            self.ended = self.stopped = True
        return text


def _error(error: MoecError, kind: str) -> dict[str, Any]:
    """The API's form of an error."""
    message = shortened(str(error))
    return {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": None}}
