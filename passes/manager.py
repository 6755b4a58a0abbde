"""Running a pipeline: each pass checked before and after, verified, timed, and dumped as it goes."""

from __future__ import annotations

import resource
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moec.errors import InputError, MoecError
from moec.ir import Module, ParseError, TypeRuleError, VerifyError, parse_module, print_module, verify
from moec.ir.dims import DimError
from moec.ir.rewrite import clone_module
from moec.passes.base import Context, Pass, PassError
from moec.passes.report import Report

if TYPE_CHECKING:
    from moec.passes.numerics import Numerics

VERIFY = ("structure", "roundtrip", "numerics")
"""What is checked after every pass: the rules; also that the text parses back; also that the results stay."""


class PassFailure(MoecError):
    """A pass that broke the module or its own promise."""

    template: ClassVar[str] = "after pass {name}: {message}"


class StrictError(InputError):
    """A warning under --strict."""

    template: ClassVar[str] = "{where}: {message} (--strict)"


@dataclass
class Record:
    """What one pass of a pipeline did."""

    name: str
    seconds: float
    ops_before: int
    ops_after: int
    matched: int
    notes: list[str]
    warnings: list[str]
    peak_mb: float
    """Greatest resident memory of the process so far."""
    moved: float | None = None
    """Measured relative change of the results, under verify numerics."""
    details: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)


@dataclass
class Manager:
    """Runs passes on a module in place; `records` tells what each did.

    With `dump`, the text before and after each pass is written there at once, so that a crash keeps what was there.
    """

    context: Context
    verify: str = "structure"
    strict: bool = False
    dump: Path | None = None
    records: list[Record] = field(default_factory=list)
    unscheduled: Module | None = field(default=None, init=False)
    """The module before the first pass that schedules it."""
    _numerics: Numerics | None = field(default=None, init=False)
    _report: Report | None = field(default=None, init=False)

    def run(self, module: Module, pipeline: Sequence[Pass], asked: Collection[str] = ()) -> Module:
        """Run all passes; raises PassError, PassFailure, StrictError or, for verify numerics, TooLarge.

        A pass named in `asked`, by a user, that matches nothing is a warning.
        """
        if self.verify == "numerics":
            from moec.passes.numerics import Numerics

            self._numerics = Numerics(module, self.context.limits.context)
        self._report = Report(module, self.context) if self.dump is not None else None
        self._write("00_import.ir", module)
        for number, step in enumerate(pipeline, start=1):
            self._step(module, step, number)
        for name in dict.fromkeys(asked):
            self._without_effect([r for r in self.records if r.name == name])
        return module

    def _without_effect(self, records: Sequence[Record]) -> None:
        if not records or any(r.matched or r.warnings for r in records):
            return
        last = records[-1]
        last.warnings.append(f"was asked for and matches nothing: {'; '.join(last.notes) or 'no place fits it'}")
        last.notes = []
        if self.dump is not None:
            (self.dump / "index.md").write_text(self.index(), encoding="utf-8")
            self._write_report()
        if self.strict:
            raise StrictError(where=f"pass {last.name}", message=last.warnings[0])

    def _step(self, module: Module, step: Pass, number: int) -> None:
        reason = step.requires(module)
        if reason:
            raise PassError(name=step.name, message=reason)
        if step.schedules and self.unscheduled is None:
            self.unscheduled = clone_module(module)
        before = sum(1 for _ in module.ops())
        start = time.perf_counter()
        try:
            outcome = step.run(module, self.context)
        except (TypeRuleError, DimError) as error:
            raise PassFailure(name=step.name, message=f"an op it makes is refused: {error}") from None
        seconds = time.perf_counter() - start
        after = sum(1 for _ in module.ops())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        record = Record(
            step.name,
            seconds,
            before,
            after,
            outcome.matched,
            outcome.notes,
            outcome.warnings,
            peak,
            details=outcome.details,
            figures=outcome.figures,
        )
        self.records.append(record)
        self._write(f"{number:02d}_{step.name}.ir", module)
        self._check(module, step)
        if record.moved is not None:
            self._write_report()
        if self.strict and outcome.warnings:
            raise StrictError(where=f"pass {step.name}", message=outcome.warnings[0])

    def _check(self, module: Module, step: Pass) -> None:
        try:
            verify(module)
        except VerifyError as error:
            raise PassFailure(name=step.name, message=str(error)) from None
        broken = step.ensures(module)
        if broken:
            raise PassFailure(name=step.name, message=broken)
        if self._numerics is not None:
            departure = self._numerics.check(module, step.tolerance)
            self.records[-1].moved = self._numerics.moved
            if departure:
                raise PassFailure(name=step.name, message=f"{departure} (tolerance {step.tolerance:g})")
        if self.verify == "roundtrip":
            text = print_module(module)
            try:
                same = print_module(parse_module(text)) == text
            except (ParseError, VerifyError) as error:
                message = f"the printed module does not parse back: {error}"
                raise PassFailure(name=step.name, message=message) from None
            if not same:
                raise PassFailure(name=step.name, message="the printed module does not parse back to itself")

    def _write(self, name: str, module: Module) -> None:
        if self.dump is None:
            return
        self.dump.mkdir(parents=True, exist_ok=True)
        (self.dump / name).write_text(print_module(module), encoding="utf-8")
        (self.dump / "index.md").write_text(self.index(), encoding="utf-8")
        if self._report is not None:
            self._report.add(module, self.records[-1] if self.records else None)
            self._write_report()

    def _write_report(self) -> None:
        if self.dump is not None and self._report is not None:
            (self.dump / "report.html").write_text(self._report.html(), encoding="utf-8")

    def index(self) -> str:
        """The pipeline as a Markdown table, one row a pass."""
        lines = ["# Passes", "", "| # | pass | ms | ops | matched | file |", "|---|---|---|---|---|---|"]
        lines.append("| 0 | (import) | | | | [00_import.ir](00_import.ir) |")
        for i, r in enumerate(self.records, start=1):
            file = f"{i:02d}_{r.name}.ir"
            ops = f"{r.ops_before} -> {r.ops_after}"
            lines.append(f"| {i} | {r.name} | {r.seconds * 1e3:.1f} | {ops} | {r.matched} | [{file}]({file}) |")
        for r in self.records:
            lines += ["", f"## {r.name}", *(f"- {n}" for n in r.notes), *(f"- warning: {w}" for w in r.warnings)]
        return "\n".join(lines) + "\n"
