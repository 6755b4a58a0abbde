"""Passes by name, and their text form `name{option=value,...}` (values as in the IR's attributes)."""

from __future__ import annotations

import inspect
import math
import re
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from moec.errors import InputError, near
from moec.passes.base import Pass
from moec.passes.bind_limits import BindLimits
from moec.passes.canonicalise import Canonicalise
from moec.passes.fp8_cast import Fp8Cast
from moec.passes.fuse import Fuse
from moec.passes.mla_absorb import MlaAbsorb
from moec.passes.overlap import Overlap
from moec.passes.place_experts import PlaceExperts
from moec.passes.select_kernels import SelectKernels
from moec.passes.shard import Shard
from moec.passes.share_heads import ShareHeads
from moec.passes.split_microbatches import SplitMicrobatches
from moec.plugins import plugins

BUILT_IN: tuple[type[Pass], ...] = (
    Canonicalise,
    BindLimits,
    PlaceExperts,
    Shard,
    MlaAbsorb,
    Fp8Cast,
    ShareHeads,
    Fuse,
    SelectKernels,
    SplitMicrobatches,
    Overlap,
)


class PassSpecError(InputError):
    """A pass specification that cannot be read."""

    template: ClassVar[str] = "--pass {spec}: {message}"


def passes() -> dict[str, type[Pass]]:
    """All passes by name: built in, then those of installed packages (entry points `moec.passes`)."""
    found = {p.name: p for p in BUILT_IN}
    found.update(plugins("moec.passes", found))
    return found


def parse_pass(spec: str) -> Pass:
    """A pass from `name` or `name{key=value,...}`; raises PassSpecError naming the part that is wrong."""
    kind, given = parse_spec(spec)
    return kind(**given)


def parse_spec(spec: str) -> tuple[type[Pass], dict[str, Any]]:
    """The pass that a spec names and the options that it gives; raises PassSpecError."""
    match = re.fullmatch(r"\s*([\w\-]+)\s*(?:\{(.*)\})?\s*", spec)
    if match is None:
        raise PassSpecError(spec=spec, message="want name or name{option=value,...}")
    known = passes()
    name, options = match.group(1), match.group(2)
    if name not in known:
        raise PassSpecError(spec=spec, message=f"no such pass{near(name, list(known))}; moec ir passes lists them")
    types = {f.name: f.type for f in fields(known[name])}
    given: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in (options or "").split(","))):
        key, equals, text = (s.strip() for s in part.partition("="))
        if not equals or key not in types:
            hint = near(key, list(types)) if types else " (it has no options)"
            raise PassSpecError(spec=spec, message=f"no option {key!r}{hint}")
        if key in given:
            raise PassSpecError(spec=spec, message=f"option {key} is given twice")
        given[key] = _value(spec, key, str(types[key]), text)
    return known[name], given


@dataclass(frozen=True)
class Described:
    """What a user has to know of a pass to name it: `options` with their types and defaults as they are written."""

    name: str
    does: str
    options: dict[str, tuple[str, str]]


def described() -> list[Described]:
    """Every pass in the order of `passes`."""
    return [
        Described(
            name,
            (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " "),
            {f.name: (str(f.type), written(f.default)) for f in fields(kind)},
        )
        for name, kind in passes().items()
    ]


def written(value: object) -> str:
    """A default as a spec has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(spec: str, key: str, kind: str, text: str) -> object:
    if kind == "bool" and text in ("true", "false"):
        return text == "true"
    if kind == "int" and re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    if kind == "float":
        with suppress(ValueError):
            if math.isfinite(number := float(text)):
                return number
    if kind == "str":
        return text
    raise PassSpecError(spec=spec, message=f"option {key} must be {kind}, got {text!r}")
