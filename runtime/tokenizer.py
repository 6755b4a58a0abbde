"""Text to tokens and back with the model's own tokenizer files, in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from moec.runtime.errors import ChatTemplateFails, NoChatTemplate, NoTokenizer, WrongTokenizer

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_SPECIAL: Final = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
Message = dict[str, Any]
"""A turn of a conversation: `role` and `content`, and what else the model's template reads."""


class Tokenizer:
    """`tokenizer.json` with what `tokenizer_config.json` and `chat_template.jinja` beside it add."""

    def __init__(self, folder: Path, artifact: str) -> None:
        """Load the files in `folder`; `artifact` names them in messages. Raises NoTokenizer or WrongTokenizer."""
        from tokenizers import Tokenizer as Fast

        self._folder = folder
        self._artifact = artifact
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise NoTokenizer(path=artifact, advice="give token ids (--prompt-ids)")
        try:
            self._fast: Any = Fast.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for every problem
            raise WrongTokenizer(file=file, problem=f"does not load ({error})") from None
        # Settings of a batch that the file was saved with, and not the model's: a prompt is cut and filled by nobody.
        self._fast.no_truncation()
        self._fast.no_padding()
        self._config = self._read("tokenizer_config.json")
        self._named = self._read("special_tokens_map.json")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the model expects around it."""
        return self.encode_counting(text)[0]

    def encode_counting(self, text: str) -> tuple[list[int], int]:
        """Token ids as `encode`, and how many bytes of `text` the first token spells: 0 when it is a special one."""
        encoding = self._fast.encode(text, add_special_tokens=True)
        ids: list[int] = encoding.ids
        first = self._fast.token_to_id(self._special("bos_token") or "")
        if self._config.get("add_bos_token") is True and first is not None and ids[:1] != [first]:
            return [first, *ids], 0
        spelled = text[: encoding.offsets[0][1]] if ids else ""
        return ids, len(spelled.encode())

    def encode_chat(self, message: str, **settings: Any) -> list[int]:
        """Token ids of a conversation that holds one user message, up to where the answer begins.

        Takes settings and raises as `encode_messages`.
        """
        return self.encode_messages([{"role": "user", "content": message}], **settings)

    def encode_messages(self, messages: list[Message], **settings: Any) -> list[int]:
        """Token ids of a conversation of messages with `role` and `content`, up to where the next answer begins.

        `settings`: variables of the model's template (`enable_thinking=False`). Raises NoChatTemplate,
        WrongTokenizer or ChatTemplateFails.
        """
        text = self.render_chat(messages, **settings)
        ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
        return ids

    def render_chat(self, messages: list[Message], **settings: Any) -> str:
        """The text that the model's Jinja template makes of `messages`, in a sandbox: templates are untrusted."""
        from moec.runtime.chat_template import TemplateFails, render

        special = {key: self._special(key) for key in _SPECIAL}
        known = {key: value for key, value in special.items() if value is not None}
        try:
            return render(self._chat_template(), messages, {**known, **settings})
        except TemplateFails as error:
            raise ChatTemplateFails(path=self._artifact, why=str(error)) from None

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._fast.decode(ids, skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """Text token by token."""
        return TextStream(self)

    def _chat_template(self) -> str:
        file = self._folder / "chat_template.jinja"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise WrongTokenizer(file=file, problem=f"is not UTF-8 ({error})") from None
        template = self._config.get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if not isinstance(template, str):
            raise NoChatTemplate(path=self._artifact)
        return template

    def _special(self, key: str) -> str | None:
        """A special token's text: the files have it as a string or as an object with `content`."""
        for source in (self._config, self._named):
            value = source.get(key)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                return content
        return None

    def _read(self, name: str) -> dict[str, Any]:
        """A JSON object beside `tokenizer.json`; empty when it is missing."""
        file = self._folder / name
        if not file.is_file():
            return {}
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise WrongTokenizer(file=file, problem=f"is not JSON ({error})") from None
        if not isinstance(config, dict):
            raise WrongTokenizer(file=file, problem="must be an object")
        return config


class TextStream:
    """Turns tokens into text as they come: a character is given out once all its bytes are there.

    What `push` and `finish` return, joined, is `decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0  # decoding starts here: one group of tokens back, for decoders that look at their neighbour
        self._told = 0  # the text of the tokens before this was given out

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty."""
        self._ids.append(token)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""  # perhaps the first bytes of a longer character
        self._begin, self._told = self._told, len(self._ids)
        return text

    def finish(self) -> str:
        """The rest: bytes that never became a character."""
        text = self._pending()
        self._begin = self._told = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._begin : self._told])
        return self._tokenizer.decode(self._ids[self._begin :])[len(before) :]
