"""Text is read and written in UTF-8 whatever the system's locale: artifacts move between machines."""

from __future__ import annotations

import ast

from imports import ROOT, sources

PLACE = {"read_text": 0, "write_text": 1}
"""Where the encoding stands among the positional arguments."""


def unspecified(text: str) -> list[int]:
    """Lines of calls that leave the encoding to the locale."""
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and len(call.args) <= PLACE.get(call.func.attr, -1)
        and not any(keyword.arg == "encoding" for keyword in call.keywords)
    ]


def test_calls_without_an_encoding_are_found() -> None:
    text = 'p.read_text()\np.read_text("utf-8")\np.write_text(x)\np.write_text(x, encoding="utf-8")\np.open()'
    assert unspecified(text) == [1, 3]


def test_every_text_file_has_an_encoding() -> None:
    found = {path: unspecified(path.read_text(encoding="utf-8")) for path in sources(ROOT)}
    assert len(found) > 400
    assert {str(path): lines for path, lines in found.items() if lines} == {}
