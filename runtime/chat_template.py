"""Chat templates of a model's folder: Jinja in a sandbox, with a bound on what it may do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any, Final

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

STEPS: Final = 2_000_000
"""Most lines of Python that a template may run: about a second, a thousand times what long conversations take."""
LONGEST: Final = 1 << 24
"""Most characters of a text that a template makes."""


class TemplateFails(Exception):
    """A template that cannot be rendered; the message says why in one line."""


class _Environment(ImmutableSandboxedEnvironment):
    """Also bounds what products and sums make."""

    intercepted_binops = frozenset(["*", "**", "+"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = all(isinstance(v, int | float) for v in (left, right))
        if operator == "**" and not (numbers and abs(right) <= 64 and abs(left) <= LONGEST):
            raise jinja2.TemplateError("a power beyond bounds")
        if operator == "*" and not numbers:
            count = next((v for v in (left, right) if isinstance(v, int)), 0)
            if count * max((len(v) for v in (left, right) if hasattr(v, "__len__")), default=0) > LONGEST:
                raise jinja2.TemplateError("a repetition beyond bounds")
        if operator == "+" and not numbers and sum(len(v) for v in (left, right) if hasattr(v, "__len__")) > LONGEST:
            raise jinja2.TemplateError("a text beyond bounds")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training: here its contents stand as they are."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        """The statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    """The text that a template makes of `messages`, up to where the answer begins. Raises TemplateFails.

    `variables`: special tokens and settings that the template reads. Tools and documents are none, as in transformers,
    whose rules for messages hold as well: a field that is null is not there, and what a model thought stands under each
    of its names.
    """

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    given = {"tools": None, "documents": None, **variables, "add_generation_prompt": True}
    try:
        with _bounded():
            text = environment.from_string(template).render(given, messages=[_message(m) for m in messages])
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise TemplateFails(str(error).partition("\n")[0]) from None
    except (RecursionError, MemoryError) as error:
        raise TemplateFails(f"it asks for too much ({type(error).__name__})") from None
    if len(text) > LONGEST:
        raise TemplateFails(f"it makes a text of {len(text)} characters")
    return text


@contextmanager
def _bounded() -> Iterator[None]:
    """End what runs inside after `STEPS` lines of Python: a template may loop for ever."""
    left, before = STEPS, sys.gettrace()

    def count(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise jinja2.TemplateError("it does not end")
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def _message(given: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in given.items() if value is not None}
    thought = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
