"""What `moec run` says to a chat model: a message, a system prompt, earlier turns, settings of the template."""

from __future__ import annotations

import json
import sys
from typing import Any, ClassVar

from moec.errors import InputError, printable


class NotMessages(InputError):
    """A file that holds no conversation."""

    template: ClassVar[str] = "{where}: {problem}; want a JSON list of {{'role': 'user', 'content': TEXT}}"


class NotASetting(InputError):
    """--chat-set that is no KEY=VALUE."""

    template: ClassVar[str] = "--chat-set wants KEY=VALUE (enable_thinking=false), got {given!r}"


class WithoutChat(InputError):
    """Options of conversations without one."""

    template: ClassVar[str] = "{option} goes with --chat or --messages"


def conversation(chat: str | None, messages: str | None, system: str | None) -> list[dict[str, Any]]:
    """The turns: a system prompt, those of a JSON file (`-`: standard input), a user's message. Raises NotMessages."""
    turns = [] if messages is None else _read(messages)
    if system is not None:
        if turns and turns[0]["role"] == "system":
            raise NotMessages(where="--system", problem="the conversation of --messages begins with a system prompt")
        turns = [{"role": "system", "content": system}, *turns]
    return turns if chat is None else [*turns, {"role": "user", "content": chat}]


def settings(given: list[str]) -> dict[str, Any]:
    """Variables of a template by name: values are JSON, or text. Raises NotASetting."""
    out: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier() or key in ("messages", "add_generation_prompt"):
            raise NotASetting(given=printable(text))
        try:
            out[key] = json.loads(value)
        except (ValueError, RecursionError):
            out[key] = value
    return out


def _read(source: str) -> list[dict[str, Any]]:
    where = "standard input" if source == "-" else printable(source)
    try:
        if source == "-":
            text = sys.stdin.read()
        else:
            with open(source, encoding="utf-8") as file:
                text = file.read()
        found = json.loads(text)
    except OSError as error:
        raise NotMessages(where=where, problem=f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise NotMessages(where=where, problem="is not JSON") from None
    if isinstance(found, dict):
        found = found.get("messages")
    if not isinstance(found, list) or not found:
        raise NotMessages(where=where, problem="holds no messages")
    for i, message in enumerate(found):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise NotMessages(where=where, problem=f"message {i} has no role")
    return found
