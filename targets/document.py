"""Reads a target file into leaves (`device.memory.bandwidth` -> value, source, line); problems by line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from moec.errors import near
from moec.targets import units
from moec.targets.fields import FIELDS, Field
from moec.targets.parameters import PARAMETERS

Value = float | str | bool | tuple[str, ...]

_MAX_BYTES: Final = 1 << 20
_HEADER: Final = ("name", "extends", "calibration_from", "sources")
_SECTIONS: Final = frozenset(
    path.rsplit(".", depth)[0] for path in (*FIELDS, *PARAMETERS) for depth in range(1, path.count(".") + 1)
)
_SHORT: Final = re.compile(r"([\w-]+)([:,].*)?", re.DOTALL)
_PARAMETER_KINDS: Final = ("physical", "effective")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a target file."""

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.message}"


@dataclass(frozen=True)
class Leaf:
    """One given value in base units, where it stands and where it is from."""

    value: Value
    source: str
    file: str
    line: int
    kind: str = ""


@dataclass
class Document:
    """One file as read, before `extends` is followed."""

    file: str
    header: dict[str, Leaf] = field(default_factory=dict)
    leaves: dict[str, Leaf] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, line: int, where: str, message: str) -> None:
        """Note a problem at a line."""
        self.problems.append(Problem(self.file, line, where, message))


def read(path: Path, shown: str) -> Document:
    """The file's leaves and problems; raises for nothing in it. `shown` names it in messages."""
    document = Document(shown)
    root = _compose(path, document)
    if root is not None:
        _Reader(document).top(root)
    return document


def _compose(path: Path, document: Document) -> Any:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_BYTES:
            document.wrong(1, "file", f"has {len(raw)} bytes; a target file has at most {_MAX_BYTES}")
            return None
        root: Any = yaml.compose(raw.decode("utf-8"), Loader=loader)
    except OSError as error:
        document.wrong(1, "file", f"cannot be read: {error.strerror}")
        return None
    except UnicodeDecodeError as error:
        document.wrong(raw[: error.start].count(b"\n") + 1, "file", "is not UTF-8 text")
        return None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "is not YAML"
        document.wrong(mark.line + 1 if mark else 1, "file", f"not valid YAML: {reason}")
        return None
    if root is None or root.id != "mapping":
        document.wrong(1, "file", "must be a mapping with `name:`, `kind:` and `device:`")
        return None
    return root


class _Reader:
    """Walks the composed nodes of one file along the field table."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.sources: dict[str, str] = {}

    def top(self, root: Any) -> None:
        entries = self._entries(root, "file")
        for key, node in entries:
            if key == "sources":
                self._sources(node)
        for key, node in entries:
            if key in _HEADER:
                if key != "sources" and (text := self._text(node, key)):
                    self.document.header[key] = Leaf(text, "", self.document.file, _line(node))
            else:
                self._visit(key, node)
        if "name" not in self.document.header:
            self.document.wrong(1, "name", "is missing; give the target a name")

    def _entries(self, node: Any, where: str) -> list[tuple[str, Any]]:
        """(key, value) pairs of a mapping; duplicates and keys that are not text are problems."""
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if key_node.id == "scalar" else None
            if key is None:
                self.document.wrong(_line(key_node), where, "has a key that is not text")
            elif key in found:
                path = key if where == "file" else f"{where}.{key}"
                self.document.wrong(_line(key_node), path, f"is given twice (first at line {_line(found[key])})")
            else:
                found[key] = value_node
                value_node.key_line = _line(key_node)
        return list(found.items())

    def _sources(self, node: Any) -> None:
        if node.id != "mapping":
            self.document.wrong(_line(node), "sources", "must map short names to texts")
            return
        for key, value in self._entries(node, "sources"):
            if text := self._text(value, f"sources.{key}"):
                self.sources[key] = text

    def _visit(self, path: str, node: Any) -> None:
        if path in FIELDS or path in PARAMETERS:
            self._leaf(path, node)
        elif path in _SECTIONS:
            if node.id != "mapping":
                inner = ", ".join(sorted(_children(path)))
                self.document.wrong(_line(node), path, f"must be a mapping with some of: {inner}")
                return
            for key, value in self._entries(node, path):
                self._visit(f"{path}.{key}", value)
        else:
            parent, _, last = path.rpartition(".")
            known = sorted(_children(parent)) + (list(_HEADER) if not parent else [])
            self.document.wrong(node.key_line, path, f"unknown field{near(last, known)}")

    def _leaf(self, path: str, node: Any) -> None:
        known = FIELDS.get(path)
        if known is None or known.form == "number":
            self._number(path, node)
        elif known.form == "words":
            self._words(known, node)
        elif text := self._text(node, path):
            self._plain(known, text, node)

    def _plain(self, known: Field, text: str, node: Any) -> None:
        if known.form == "flag":
            if text not in ("true", "false"):
                self.document.wrong(_line(node), known.path, f"{text!r} must be true or false")
                return
            self._keep(known.path, text == "true", node)
        elif known.choices and text not in known.choices:
            message = f"{text!r} is not one of {', '.join(known.choices)}"
            self.document.wrong(_line(node), known.path, message)
        else:
            self._keep(known.path, text, node)

    def _words(self, known: Field, node: Any) -> None:
        if node.id != "sequence":
            self.document.wrong(_line(node), known.path, "must be a list such as [a, b]")
            return
        words = tuple(text for item in node.value if (text := self._text(item, known.path)))
        for item in node.value:
            if known.choices and item.id == "scalar" and item.value not in known.choices:
                message = f"{item.value!r} is not one of {', '.join(known.choices)}"
                self.document.wrong(_line(item), known.path, message)
                return
        self._keep(known.path, words, node)

    def _number(self, path: str, node: Any) -> None:
        parameter = PARAMETERS.get(path)
        dimension = parameter.dimension if parameter else FIELDS[path].dimension
        example = units.EXAMPLES[dimension]
        if node.id != "mapping":
            self.document.wrong(_line(node), path, f"must be {{value: {example}, source: where it is from}}")
            return
        entries = dict(self._entries(node, path))
        allowed = ("value", "source", "kind") if parameter else ("value", "source")
        for key, value in entries.items():
            if key not in allowed:
                message = f"unknown field{near(key, list(allowed))}"
                self.document.wrong(value.key_line, f"{path}.{key}", message)
        source = self._source(path, node, entries)
        kind = self._kind(path, node, entries) if parameter else ""
        value = self._value(path, node, entries, dimension)
        if value is not None and source is not None and kind is not None:
            line = _line(entries["value"])
            self.document.leaves[path] = Leaf(value, source, self.document.file, line, kind)

    def _source(self, path: str, node: Any, entries: dict[str, Any]) -> str | None:
        if "source" not in entries:
            message = "has no `source:`; say where the number is from (a data sheet, a paper, a measurement)"
            self.document.wrong(node.key_line, path, message)
            return None
        text = self._text(entries["source"], f"{path}.source")
        if text is None:
            return None
        match = _SHORT.fullmatch(text)
        if match is None or match[1] not in self.sources:
            return text
        return self.sources[match[1]] + (match[2] or "")

    def _kind(self, path: str, node: Any, entries: dict[str, Any]) -> str | None:
        kind = self._text(entries["kind"], f"{path}.kind") if "kind" in entries else None
        if kind not in _PARAMETER_KINDS:
            line = _line(entries["kind"]) if "kind" in entries else node.key_line
            self.document.wrong(line, f"{path}.kind", "must be physical or effective")
            return None
        return kind

    def _value(self, path: str, node: Any, entries: dict[str, Any], dimension: str) -> float | None:
        if "value" not in entries:
            self.document.wrong(node.key_line, path, f"has no `value:` (such as {units.EXAMPLES[dimension]})")
            return None
        text = self._text(entries["value"], path)
        if text is None:
            return None
        line = _line(entries["value"])
        try:
            value = units.parse(text, dimension)
        except ValueError as error:
            self.document.wrong(line, path, str(error))
            return None
        limits = PARAMETERS.get(path) or FIELDS[path]
        if not limits.low <= value <= limits.high:
            low, high = (units.show(limit, dimension) for limit in (limits.low, limits.high))
            self.document.wrong(line, path, f"{text!r} is not plausible; expected {low} to {high}")
            return None
        return value

    def _text(self, node: Any, path: str) -> str | None:
        if node.id != "scalar" or not node.value.strip() or node.tag == "tag:yaml.org,2002:null":
            self.document.wrong(_line(node), path, "must be one value, not empty, a list or a mapping")
            return None
        return str(node.value).strip()

    def _keep(self, path: str, value: Value, node: Any) -> None:
        self.document.leaves[path] = Leaf(value, "", self.document.file, _line(node))


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _children(path: str) -> set[str]:
    prefix = f"{path}." if path else ""
    return {p.removeprefix(prefix).split(".")[0] for p in (*FIELDS, *PARAMETERS) if p.startswith(prefix)}


def borrowed(leaves: dict[str, Leaf], name: str) -> dict[str, Leaf]:
    """The calibration leaves of another target, marked as assumed to hold here."""
    return {
        path: replace(leaf, source=f"assumed to be as on {name}: {leaf.source}")
        for path, leaf in leaves.items()
        if path in PARAMETERS
    }
