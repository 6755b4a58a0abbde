"""Precision recipes: small YAML files that give weights, inputs of products, activations and cache their types.

    doc: one line
    rules:                                       the first rule that fits a weight decides its type
      - {op: head, weight: bf16}
      - {name: "*.shared.*", weight: bf16}
      - {op: [linear, moe.experts], weight: "fp8_e4m3 scale(f32, 128x128)", input: "fp8_e4m3 scale(f32, 1x128)"}
    activations: bf16
    cache: bf16
    combine: bf16

`op` globs the kind of use: `linear`, `linear.heads`, `moe.experts`, `moe.route` (the gate), `gate` (of shared
experts, and of index heads), `head`, `embed`, `bias`, `norm.rms`; `name` globs the weight's name in the IR. Types are
written as in the IR. `input` quantises what the product reads, `combine` the experts' results on their way back (bf16,
fp8 or logfmt10), and `weight: checkpoint` keeps what the checkpoint holds, as a weight that no rule fits is kept.
`cache: fp8` is the row of 656 bytes for a latent of 512 and a key of 64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import yaml

from moec.errors import InputError, near, printable
from moec.ir.ops.core import FLOATS
from moec.ir.types import BITS, QUANTISED, SCALE_BITS, Quant

FOLDER = Path(__file__).resolve().parent / "recipes"
FIELDS = ("doc", "rules", "activations", "cache", "combine")
RULE_FIELDS = ("op", "name", "weight", "input")
COMBINE = {
    "bf16": "bf16",
    "fp8": "fp8_e4m3 scale(f32, 1x128)",
    "logfmt10": "logfmt10 scale(logrange, 1x128)",
}
"""Short names of what experts' results travel in."""
KINDS = (
    "linear", "linear.heads", "moe.experts", "moe.route", "gate", "head", "embed", "bias",
    "norm.rms", "norm.add_rms", "norm.layer",
)  # fmt: skip
"""What rules call uses of weights."""
CACHE = {"bf16": "bf16", "f32": "f32", "fp8": "fp8_e4m3 scale(f32, 1x128)"}
"""Short names of cache types."""
KEPT = "checkpoint"
"""A weight's type that stands for whatever the checkpoint holds."""
_TYPE = re.compile(r"\s*(\w+)\s*(?:scale\(\s*(\w+)\s*,\s*(\d{1,7}x\d{1,7})\s*\))?\s*")


class RecipeError(InputError):
    """A recipe that cannot be read."""

    template: ClassVar[str] = "recipe {recipe}: {message}"


class UnknownRecipe(InputError):
    """A recipe that is neither shipped nor a file."""

    template: ClassVar[str] = "recipe {recipe!r} is not known{hint}; a path to a recipe file (.yaml) works too"


@dataclass(frozen=True)
class Element:
    """How elements are stored: their type, and scales of blocks of the last two dims when it is a scaled one."""

    dtype: str
    quant: Quant | None = None

    def __str__(self) -> str:
        return f"{self.dtype} {self.quant}" if self.quant else self.dtype

    @property
    def granularity(self) -> str:
        """The block as an attribute of `quant.cast` and `weight.quantise`."""
        assert self.quant is not None
        return "x".join(map(str, self.quant.block))

    def scaled_by(self, scale: str) -> Element:
        """The same with another scale format."""
        return replace(self, quant=replace(self.quant, scale=scale)) if self.quant else self


@dataclass(frozen=True)
class Rule:
    """Which uses of weights a rule fits (globs), the type of the weight, and of the product's input."""

    op: tuple[str, ...]
    name: tuple[str, ...]
    weight: Element
    input: Element | None = None

    def fits(self, kind: str, name: str) -> bool:
        """Whether a weight of this kind of use and name falls under the rule."""
        return any(fnmatchcase(kind, g) for g in self.op) and any(fnmatchcase(name, g) for g in self.name)

    def __str__(self) -> str:
        return f"{'|'.join(self.op)} {'|'.join(self.name)}"


@dataclass(frozen=True)
class Recipe:
    """Types of weights by rule, of activations, of the cache, and of the experts' results on their way back."""

    name: str
    doc: str
    rules: tuple[Rule, ...]
    activations: str
    cache: Element
    combine: Element

    def rule(self, kind: str, weight: str) -> Rule | None:
        """The rule that decides, if any."""
        return next((r for r in self.rules if r.fits(kind, weight)), None)

    def scaled_by(self, scale: str) -> Recipe:
        """The recipe with every scale of a product in format `scale`."""
        rules = [
            replace(r, weight=r.weight.scaled_by(scale), input=r.input.scaled_by(scale) if r.input else None)
            for r in self.rules
        ]
        return replace(self, rules=tuple(rules))

    def without_inputs(self) -> Recipe:
        """The recipe for devices that widen weights: inputs of products are not quantised."""
        return replace(self, rules=tuple(replace(r, input=None) for r in self.rules))

    @property
    def scale_formats(self) -> set[str]:
        """Scale formats of quantised products."""
        return {r.weight.quant.scale for r in self.rules if r.weight.quant and r.input}


def names() -> list[str]:
    """Recipes that come with moec."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load(spec: str) -> Recipe:
    """A shipped recipe by name, or one from a `.yaml` file; raises UnknownRecipe or RecipeError."""
    if spec in names():
        return read(FOLDER / f"{spec}.yaml", spec)
    if spec.endswith((".yaml", ".yml")):
        return read(Path(spec), Path(spec).stem)
    raise UnknownRecipe(recipe=printable(spec), hint=near(spec, ["auto", *names()]))


def read(path: Path, name: str) -> Recipe:
    """Read one file; raises RecipeError with the field that is wrong."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(recipe=printable(path), message=error.strerror) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise RecipeError(recipe=printable(path), message=f"is not YAML{where}") from None
    try:
        return parse(name, raw)
    except ValueError as error:
        raise RecipeError(recipe=printable(path if path.parent != FOLDER else name), message=error) from None


def parse(name: str, raw: Any) -> Recipe:
    """A recipe from plain data; raises ValueError naming the field."""
    if not isinstance(raw, Mapping):
        raise ValueError("must be a mapping with rules")
    _only(raw, FIELDS, "")
    rules = raw.get("rules")
    if not isinstance(rules, list) or not rules:
        raise ValueError("rules must be a list with at least one rule")
    activations = _element(raw.get("activations", "bf16"), "activations")
    if activations.dtype not in FLOATS:
        raise ValueError(f"activations: {activations.dtype} is no type to compute in (known: {', '.join(FLOATS)})")
    return Recipe(
        name,
        str(raw.get("doc", "")),
        tuple(_rule(r, f"rules[{i}]") for i, r in enumerate(rules)),
        activations.dtype,
        _element(CACHE.get(str(raw.get("cache")), raw.get("cache", "bf16")), "cache"),
        _element(COMBINE.get(str(raw.get("combine")), raw.get("combine", "bf16")), "combine"),
    )


def _only(raw: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in raw:
        if key not in known:
            raise ValueError(f"{where}unknown field {printable(key)}{near(str(key), list(known))}")


def _rule(raw: Any, where: str) -> Rule:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} must be a mapping with weight, and op or name")
    _only(raw, RULE_FIELDS, f"{where}: ")
    if "weight" not in raw:
        raise ValueError(f"{where} gives no weight: a type such as bf16 or fp8_e4m3 scale(f32, 128x128)")
    if "op" not in raw and "name" not in raw:
        raise ValueError(f"{where} names no weight: give op or name (a glob)")
    weight = Element(KEPT) if raw["weight"] == KEPT else _element(raw["weight"], f"{where}.weight")
    given = _element(raw["input"], f"{where}.input") if "input" in raw else None
    if given is not None and not (given.quant and weight.quant):
        raise ValueError(f"{where}: a quantised input needs scaled types for input and weight")
    if given is not None and given.quant and weight.quant and given.quant.scale != weight.quant.scale:
        raise ValueError(f"{where}: input and weight have scales in {given.quant.scale} and {weight.quant.scale}")
    kinds = _globs(raw.get("op", "*"), where)
    for glob in kinds:
        if not any(fnmatchcase(kind, glob) for kind in KINDS):
            raise ValueError(f"{where}: no use of a weight is called {printable(glob)}{near(glob, list(KINDS))}")
    return Rule(kinds, _globs(raw.get("name", "*"), where), weight, given)


def _globs(raw: Any, where: str) -> tuple[str, ...]:
    globs = raw if isinstance(raw, list) else [raw]
    if not globs or not all(isinstance(g, str) for g in globs):
        raise ValueError(f"{where}: op and name are globs or lists of globs")
    return tuple(globs)


def _element(raw: Any, where: str) -> Element:
    match = _TYPE.fullmatch(raw) if isinstance(raw, str) else None
    if match is None:
        raise ValueError(f"{where}: {printable(raw)!r} is no type such as bf16 or fp8_e4m3 scale(f32, 128x128)")
    dtype, scale, block = match.groups()
    if dtype not in BITS:
        raise ValueError(f"{where}: unknown type {dtype}{near(dtype, [*FLOATS, *QUANTISED])}")
    if scale is not None and scale not in SCALE_BITS:
        raise ValueError(f"{where}: unknown scale format {scale}{near(scale, list(SCALE_BITS))}")
    if (scale is None) == (dtype in QUANTISED):
        need = "needs a scale, such as scale(f32, 128x128)" if scale is None else "takes no scale"
        raise ValueError(f"{where}: {dtype} {need}")
    if scale is None and dtype not in FLOATS:
        raise ValueError(f"{where}: {dtype} is no type for weights (known: {', '.join((*FLOATS, *QUANTISED))})")
    return Element(dtype, Quant(scale, tuple(map(int, block.split("x")))) if scale else None)


def short(names: Mapping[str, str], name: str) -> Element:
    """The type behind a short name of `COMBINE` or `CACHE`."""
    return _element(names[name], name)
