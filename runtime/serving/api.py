"""Requests and answers in the form of OpenAI's API (platform.openai.com/docs/api-reference: completions, chat).

What a request may hold is in `_FIELDS`; a field that would change the answer and is not supported is refused by name.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any, Final

from moec.errors import InputError, near
from moec.runtime.errors import NoRoom
from moec.runtime.model import Model
from moec.runtime.sampling import Sampling

_SAMPLING: Final = {"temperature", "top_p", "top_k", "min_p", "seed"}
_COMMON: Final = {"model", "max_tokens", "stop", "stream", "stream_options", "ignore_eos", "user"} | _SAMPLING
_FIELDS: Final = {False: _COMMON | {"prompt"}, True: _COMMON | {"messages", "max_completion_tokens"}}
_IDLE: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": (None, ""),
    "logprobs": (None, False), "top_logprobs": (None, 0),
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": (None, {}),
    "tools": (None, []), "response_format": (None, {"type": "text"}), "store": (None, False), "metadata": (None, {}),
}  # fmt: skip
"""Fields of the API that are taken with these values alone: they change nothing."""
_COMPLETION_TOKENS: Final = 16


class WrongRequest(InputError):
    """A body that is no request; `param` is the field."""

    template = "{message}"
    param: str | None


class OtherModel(InputError):
    """A model that is not served."""

    template = "the model {name!r} is not served here: this is {served!r}"


@dataclass(frozen=True)
class Wanted:
    """A request: the prompt's tokens and how to continue them."""

    chat: bool
    ids: list[int]
    new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    stream_usage: bool


def parse(body: Any, chat: bool, model: Model, name: str) -> Wanted:
    """A request from the body of /v1/completions or, `chat`, /v1/chat/completions, for the model served as `name`.

    Raises WrongRequest, OtherModel, and what the tokenizer and Sampling raise.
    """
    if not isinstance(body, dict):
        raise WrongRequest(message="the body must be a JSON object", param=None)
    _known(body, chat)
    if body.get("model") not in (None, name):
        raise OtherModel(name=body["model"], served=name)
    temperature = _number(body, "temperature", 1.0)
    seed = body.get("seed")
    sampling = Sampling(
        temperature,
        _number(body, "top_p", 1.0),
        secrets.randbits(48) if seed is None else _whole(body, "seed", 0),
        _whole(body, "top_k", 0),
        _number(body, "min_p", 0.0),
    )
    stream = _flag(body, "stream")
    ids = _messages(body, model) if chat else _prompt(body, model)
    room = model.context - len(ids) + 1
    key = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    new = _whole(body, key, max(1, room) if chat else _COMPLETION_TOKENS)
    if new < 1:
        raise WrongRequest(message=f"{key} must be at least 1, is {new}", param=key)
    if new > room > 0:
        needed = len(ids) + new - 1
        raise NoRoom(tokens=len(ids), new=new, context=model.context, room=room, needed=needed)
    return Wanted(chat, ids, new, sampling, _stops(body), _flag(body, "ignore_eos"), stream, _usage_wanted(body))


class Answer:
    """What goes back: whole, or as the events of a stream."""

    def __init__(self, wanted: Wanted, name: str) -> None:
        self.wanted = wanted
        kind = ("chat.completion" if wanted.chat else "text_completion") + (
            ".chunk" if wanted.stream and wanted.chat else ""
        )
        self._head = {
            "id": f"{'chatcmpl' if wanted.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, text: str, tokens: list[int], ended: bool) -> dict[str, Any]:
        """The answer to a request without `stream`; `ended` by a stop text or token, not by its length."""
        said: dict[str, Any] = {"text": text}
        if self.wanted.chat:
            said = {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": "stop" if ended else "length"}
        return {**self._head, "choices": [{**choice, "token_ids": tokens}], "usage": self._usage(tokens)}

    def begin(self) -> list[dict[str, Any]]:
        """Events before the first token."""
        return [self._event({"delta": {"role": "assistant", "content": ""}})] if self.wanted.chat else []

    def piece(self, text: str, tokens: list[int]) -> dict[str, Any]:
        """The event of some text and the tokens since the last one."""
        said = {"delta": {"content": text}} if self.wanted.chat else {"text": text}
        return self._event({**said, "token_ids": tokens})

    def end(self, tokens: list[int], ended: bool) -> list[dict[str, Any]]:
        """Events after the last token."""
        said: dict[str, Any] = {"delta": {}} if self.wanted.chat else {"text": ""}
        events = [self._event(said, "stop" if ended else "length")]
        if self.wanted.stream_usage:
            events.append({**self._head, "choices": [], "usage": self._usage(tokens)})
        return events

    def _event(self, said: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}

    def _usage(self, tokens: list[int]) -> dict[str, int]:
        prompt, new = len(self.wanted.ids), len(tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _known(body: dict[str, Any], chat: bool) -> None:
    for key, value in body.items():
        if key in _FIELDS[chat]:
            continue
        if key not in _IDLE:
            hint = near(key, sorted(_FIELDS[chat]))
            raise WrongRequest(message=f"the field {key!r} is not known{hint}", param=key)
        if value is not None and value not in _IDLE[key]:
            raise WrongRequest(message=f"{key} = {value!r} is not supported", param=key)


def _prompt(body: dict[str, Any], model: Model) -> list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt)
    if isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        return prompt
    raise WrongRequest(message="prompt must be one text or one list of token ids", param="prompt")


def _messages(body: dict[str, Any], model: Model) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise WrongRequest(message="messages must be a list of at least one message", param="messages")
    return model.tokenizer.encode_messages([_message(m, i) for i, m in enumerate(messages)])


def _message(message: Any, index: int) -> dict[str, str]:
    wrong = f"messages[{index}] must be an object with a text for role and for content"
    if not isinstance(message, dict):
        raise WrongRequest(message=wrong, param="messages")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        content = "".join(p for p in parts if isinstance(p, str)) if all(isinstance(p, str) for p in parts) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise WrongRequest(message=wrong, param="messages")
    return {"role": role, "content": content}


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    texts = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
        raise WrongRequest(message="stop must be a text or a list of texts, none of them empty", param="stop")
    return tuple(texts)


def _usage_wanted(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise WrongRequest(message="stream_options takes include_usage alone", param="stream_options")
    return _flag(options, "include_usage")


def _number(body: dict[str, Any], key: str, default: float) -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongRequest(message=f"{key} must be a number, is {value!r}", param=key)
    return float(value)


def _whole(body: dict[str, Any], key: str, default: int) -> int:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 63:
        raise WrongRequest(message=f"{key} must be a whole number, is {value!r}", param=key)
    return value


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise WrongRequest(message=f"{key} must be true or false, is {value!r}", param=key)
    return bool(value)
