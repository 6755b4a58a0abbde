"""`moec serve`: answers over HTTP against what the model generates; wrong requests; clients that go."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from toy_artifact import CONTEXT, VOCAB

from moec.runtime import Model, load
from moec.runtime.serving.http import HttpServer
from moec.runtime.serving.worker import Worker


@pytest.fixture(scope="module")
def model(toy: Path) -> Model:
    """What answers are compared with."""
    return load(toy)


@pytest.fixture(scope="module")
def port(toy: Path) -> Iterator[int]:
    """The port of a server of the toy model."""
    served = load(toy)
    worker = Worker(served)
    with HttpServer(served, worker, "toy", "127.0.0.1", 0, log=False) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()
    worker.close()
    assert served.engine.pool.free == served.engine.pool.pages


def ask(port: int, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
    """Status and JSON of an answer; `body` as bytes or as what JSON says."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method or ("POST" if data is not None else "GET"), path, data)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def events(port: int, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, up to its end."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps({**body, "stream": True}))
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
    lines = [line for line in answer.read().decode().split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_what_the_model_generates(port: int, model: Model) -> None:
    status, answer = ask(port, "/v1/completions", {"prompt": "hello", "max_tokens": 20, "temperature": 0})
    new = model.generate(model.tokenizer.encode("hello"), 20)
    choice = answer["choices"][0]
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "toy"
    assert (choice["token_ids"], choice["text"]) == (new, model.tokenizer.decode(new))  # type: ignore[arg-type]
    assert choice["finish_reason"] in ("length", "stop") and choice["index"] == 0
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": len(new), "total_tokens": 5 + len(new)}


def test_a_chat_goes_through_the_template(port: int, model: Model) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = {"messages": messages, "max_completion_tokens": 9, "temperature": 0}
    status, answer = ask(port, "/v1/chat/completions", body)
    ids = model.tokenizer.encode_messages([{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}])
    new = model.generate(ids, 9)
    assert status == 200 and answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": model.tokenizer.decode(new)}  # type: ignore[arg-type]
    chunks = events(port, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]]
    assert "".join(said) == answer["choices"][0]["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == answer["usage"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


def test_a_stream_gives_every_token_once(port: int, model: Model) -> None:
    chunks = events(port, "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 30, "temperature": 0})
    new = model.generate([1, 2, 3], 30)
    assert [t for c in chunks for t in c["choices"][0].get("token_ids", [])] == new
    assert "".join(c["choices"][0]["text"] for c in chunks) == model.tokenizer.decode(new)  # type: ignore[arg-type]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it(port: int, model: Model) -> None:
    """Also those of `moec run --seed`."""
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 1.0, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 5}
    expected = model.generate(
        model.tokenizer.encode("abc"), 12, temperature=1.0, top_p=0.9, top_k=40, min_p=0.01, seed=5
    )
    with ThreadPoolExecutor(8) as pool:
        others = [
            pool.submit(ask, port, "/v1/completions", {**body, "seed": s, "prompt": "x" * s}) for s in range(1, 9)
        ]
        found = [pool.submit(ask, port, "/v1/completions", body) for _ in range(6)]
    assert all(f.result()[1]["choices"][0]["token_ids"] == expected for f in found)
    assert {f.result()[0] for f in others} == {200}
    unseeded = {k: v for k, v in body.items() if k != "seed"}
    assert len({tuple(ask(port, "/v1/completions", unseeded)[1]["choices"][0]["token_ids"]) for _ in range(4)}) > 1


def test_a_stop_text_ends_before_it(port: int, model: Model) -> None:
    text = str(model.tokenizer.decode(model.generate([1, 2, 3], 40)))  # type: ignore[arg-type]
    stop = text[7:9]
    body = {"prompt": [1, 2, 3], "max_tokens": 40, "temperature": 0, "stop": ["never said", stop]}
    choice = ask(port, "/v1/completions", body)[1]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    assert "".join(c["choices"][0]["text"] for c in events(port, "/v1/completions", body)) == choice["text"]


def test_ignore_eos_goes_on(port: int) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    answer = ask(port, "/v1/completions", body)[1]
    assert answer["usage"]["completion_tokens"] == 60 and answer["choices"][0]["finish_reason"] == "length"


def test_what_is_served(port: int) -> None:
    assert ask(port, "/health") == (200, {"status": "ok", "requests": 0})
    status, listed = ask(port, "/v1/models")
    assert status == 200 and [(m["id"], m["max_model_len"]) for m in listed["data"]] == [("toy", CONTEXT)]


WRONG: list[tuple[str, Any, int, str]] = [
    ("completions", b"", 400, "the body is not JSON"),
    ("completions", b"{", 400, "the body is not JSON"),
    ("completions", b"\xff\xfe", 400, "the body is not JSON"),
    ("completions", b"[" * 100000, 400, "the body is not JSON"),
    ("completions", [], 400, "the body must be a JSON object"),
    ("completions", {}, 400, "prompt must be one text or one list of token ids"),
    ("completions", {"prompt": 5}, 400, "prompt must be"),
    ("completions", {"prompt": ["a", "b"]}, 400, "prompt must be"),
    ("completions", {"prompt": [True]}, 400, "prompt must be"),
    ("completions", {"prompt": ""}, 400, "the prompt is empty"),
    ("completions", {"prompt": []}, 400, "the prompt is empty"),
    ("completions", {"prompt": [VOCAB]}, 400, f"token id {VOCAB} at position 0 is outside the vocabulary"),
    ("completions", {"prompt": [1 << 70]}, 400, "token ids must be integers"),
    ("completions", {"prompt": "x" * (CONTEXT + 1)}, 400, f"the prompt has {CONTEXT + 1} tokens"),
    ("completions", {"prompt": "x", "max_tokens": CONTEXT + 1}, 400, "exceed the compiled context"),
    ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens must be at least 1"),
    ("completions", {"prompt": "x", "max_tokens": 1.5}, 400, "max_tokens must be a whole number"),
    ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature must be"),
    ("completions", {"prompt": "x", "temperature": "hot"}, 400, "temperature must be a number"),
    ("completions", b'{"prompt": "x", "temperature": NaN}', 400, "temperature must be"),
    ("completions", {"prompt": "x", "top_p": 0}, 400, "top-p must be"),
    ("completions", {"prompt": "x", "seed": -1}, 400, "seed must be"),
    ("completions", {"prompt": "x", "stop": ""}, 400, "stop must be"),
    ("completions", {"prompt": "x", "stop": [1]}, 400, "stop must be"),
    ("completions", {"prompt": "x", "stream": "yes"}, 400, "stream must be true or false"),
    ("completions", {"prompt": "x", "n": 2}, 400, "n = 2 is not supported"),
    ("completions", {"prompt": "x", "logprobs": 5}, 400, "logprobs = 5 is not supported"),
    ("completions", {"prompt": "x", "max_token": 5}, 400, "did you mean max_tokens"),
    ("completions", {"prompt": "x", "model": "gpt"}, 404, "the model 'gpt' is not served here: this is 'toy'"),
    ("chat/completions", {"messages": []}, 400, "messages must be a list"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0] must be an object"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0]"),
    ("chat/completions", {"prompt": "x"}, 400, "the field 'prompt' is not known"),
    ("nothing", {}, 404, "there is no /v1/nothing"),
    ("models", {}, 405, "/v1/models takes GET"),
]


@pytest.mark.parametrize(("path", "body", "status", "says"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_requests_say_why(port: int, path: str, body: Any, status: int, says: str) -> None:
    found, answer = ask(port, f"/v1/{path}", body)
    assert found == status and says in answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_other_methods_and_lengths(port: int) -> None:
    assert ask(port, "/v1/completions", method="GET")[0] == 405
    assert ask(port, "/")[0] == 404
    with socket.create_connection(("127.0.0.1", port), 30) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert s.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_client_that_goes_away_frees_its_place(port: int) -> None:
    body = json.dumps({"prompt": [1], "max_tokens": CONTEXT, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(4):  # more than there are places
        with socket.create_connection(("127.0.0.1", port), 30) as s:
            s.sendall(head + body)
            s.recv(100)
    for _ in range(300):
        if ask(port, "/health")[1]["requests"] == 0:
            break
        time.sleep(0.1)
    assert ask(port, "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200


def test_the_command_serves_and_ends(toy: Path) -> None:
    command = [sys.executable, "-m", "moec", "serve", str(toy), "--port", "0", "--name", "mine"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"TVM_NUM_THREADS": "1"})
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"^moec: serving mine at http://127\.0\.0\.1:(\d+) \(batch 3, context 200\); ", line)
        assert found, line
        assert ask(int(found[1]), "/v1/completions", {"prompt": "hello", "model": "mine"})[0] == 200
        assert re.fullmatch(
            r"moec: /v1/completions 200, 5 prompt tokens, \d+ new, \d+\.\d\d s\n", process.stderr.readline()
        )
        again = subprocess.run([*command[:6], found[1]], capture_output=True, text=True, timeout=60)
        assert again.returncode == 1 and again.stderr.count("\n") == 1
        assert f"cannot listen at 127.0.0.1:{found[1]}: Address already in use" in again.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 128 + signal.SIGINT
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
