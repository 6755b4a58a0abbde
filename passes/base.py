"""What a pass is: a frozen dataclass with a name, options as fields, a contract in its docstring, and `run`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from moec.errors import InputError
from moec.ir import Function, Location, Module, Op, Value
from moec.ir.module import Attribute, Operand
from moec.ir.optable import OPS, infer
from moec.targets import Target

if TYPE_CHECKING:
    from moec.passes.planning.layout import Layout


class PassError(InputError):
    """A pass that cannot do what was asked."""

    template: ClassVar[str] = "pass {name}: {message}"


@dataclass(frozen=True)
class Limits:
    """What an artifact is compiled for: sequences in a batch, tokens of context, tokens of a prefill chunk.

    `drafts`: tokens of each sequence that a decode step verifies besides its next one.
    """

    batch: int = 1
    context: int = 4096
    chunk: int = 256
    drafts: int = 0


@dataclass(frozen=True)
class Context:
    """What passes know besides the module."""

    target: Target
    limits: Limits = field(default_factory=Limits)
    layout: Layout | None = None
    """How the model lies on the devices; None where only one is meant."""


@dataclass
class Outcome:
    """What a pass did: places matched, one line for each change or decision, warnings with their reason."""

    matched: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    """Lines for the report alone: what a decision rests on."""
    figures: list[str] = field(default_factory=list)
    """Pictures for the report, as SVG."""


@dataclass(frozen=True)
class Pass(ABC):
    """Base of passes; subclasses are frozen dataclasses whose fields are their command-line options."""

    name: ClassVar[str]
    tolerance: ClassVar[float] = 0.0
    """Relative change of results that the pass may cause; 0 for pure re-orderings."""
    schedules: ClassVar[bool] = False
    """Whether what it makes is for an executor of micro-batches and streams."""

    def requires(self, module: Module) -> str:
        """Why the pass cannot run on this module; empty when it can."""
        return ""

    @abstractmethod
    def run(self, module: Module, ctx: Context) -> Outcome:
        """Change the module in place."""

    def ensures(self, module: Module) -> str:
        """What the pass promised and the module breaks; empty when it keeps it."""
        return ""


class Edit:
    """Rewriting of one function: ops are inserted before an op, results replaced; locations carry the pass's name.

    New values get provisional names: number the function again with `rewrite.fresh_names` when done.
    """

    def __init__(self, module: Module, function: Function, pass_name: str) -> None:
        self.module = module
        self.function = function
        self.pass_name = pass_name
        self._count = sum(len(op.results) for op in function.ops) + len(function.args)

    def insert(
        self, at: Op, name: str, *operands: Operand, attrs: Mapping[str, Attribute] | None = None
    ) -> list[Value]:
        """Insert an op before `at`, with its location; returns its results."""
        given = dict(attrs or {})
        results = []
        for type_ in infer(OPS[name], operands, given, self.module):
            results.append(Value(f"v{self._count}", type_))
            self._count += 1
        op = Op(name, list(operands), given, results, self.location(at.loc))
        self.function.ops.insert(self.function.ops.index(at), op)
        return results

    def location(self, loc: Location | None) -> Location | None:
        """`loc` with this pass behind it."""
        return loc.through(self.pass_name) if loc else None
