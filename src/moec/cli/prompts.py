"""Prompts of `moec run`: from an option, from standard input, or many from a file of JSON Lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.errors import InputError

if TYPE_CHECKING:
    from moec.runtime import Model


class NotTokenIds(InputError):
    """--prompt-ids is no list of integers."""

    template = "--prompt-ids must be integers with commas between them (1,2,3), is {value!r}"


class WrongPrompts(InputError):
    """A file of prompts that cannot be read."""

    template = "{file}: {problem}"


class WrongPrompt(InputError):
    """A line of a file of prompts that is none, or that the model does not take."""

    template = "{file}:{line}: {problem}"


def parse_ids(text: str) -> list[int]:
    """Token ids with commas between them; raises NotTokenIds."""
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise NotTokenIds(value=text) from None


def text_of(option: str) -> str:
    """The text that an option gives: for `-` what standard input holds, less the line break at its end."""
    return _read("-").removesuffix("\n") if option == "-" else option


def read_prompts(file: str, model: Model) -> list[list[int]]:
    """Token ids of every line of a file (`-`: standard input): a JSON string, or an object that holds one of `prompt`,
    `chat` and `prompt_ids`. Raises WrongPrompts and WrongPrompt."""
    lines = _read(file).splitlines()
    found = [_prompt(file, number, line, model) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise WrongPrompts(file=file, problem="holds no prompt: give one a line, as a JSON string or object")
    return found


def _prompt(file: str, number: int, line: str, model: Model) -> list[int]:
    wrong = 'must be a JSON string, or an object such as {"prompt": "text"}, {"chat": "text"} or {"prompt_ids": [1, 2]}'
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise WrongPrompt(file=file, line=number, problem=wrong) from None
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict) or len(value) != 1:
        raise WrongPrompt(file=file, line=number, problem=wrong)
    ((key, content),) = value.items()
    if key == "prompt" and isinstance(content, str):
        ids = model.tokenizer.encode(content)
    elif key == "chat" and isinstance(content, str):
        ids = model.tokenizer.encode_chat(content)
    elif key == "prompt_ids" and isinstance(content, list) and all(type(i) is int for i in content):
        ids = content
    else:
        raise WrongPrompt(file=file, line=number, problem=wrong)
    if not 0 < len(ids) <= model.context:
        problem = f"the prompt has {len(ids)} tokens, the artifact takes 1 to {model.context}"
        raise WrongPrompt(file=file, line=number, problem=problem)
    if wrong_id := next((i for i in ids if not 0 <= i < model.vocab), None):
        raise WrongPrompt(file=file, line=number, problem=f"token id {wrong_id} is not in 0 to {model.vocab - 1}")
    return ids


def _read(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise WrongPrompts(file=file, problem=error.strerror or "cannot be read") from None
    except UnicodeDecodeError as error:
        raise WrongPrompts(file=file, problem=f"is not UTF-8 text (byte {error.start})") from None
