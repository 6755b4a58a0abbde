"""Fits the cost model's parameters to measured rows, and says how well they predict rows that the fit did not see.

Rows are `moec cost` rows with `time_us`. Families are fitted one after the other, by least squares of log(predicted /
measured) with a soft L1 loss, inside each parameter's plausible range. A weak pull to the starting values keeps
parameters that the rows do not determine where they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from moec.targets.cost.errors import NothingToFit, Uncalibrated, UnknownOp, WrongRow, WrongRowsFile
from moec.targets.cost.row import Row, checked, op_time
from moec.targets.parameters import PARAMETERS
from moec.targets.schema import Parameter, Target

# Scatter of one measurement (log), and how far a parameter may lie from its start: a factor of two is one sigma.
_ROW_SIGMA: Final = 0.1
_PRIOR_SIGMA: Final = math.log(2)
_EPSILON: Final = 1e-12


@dataclass(frozen=True)
class Family:
    """Rows that share parameters, and the parameters that they determine."""

    name: str
    matches: Callable[[Row], bool]
    parameters: tuple[str, ...]


def _parameters(*names: str) -> tuple[str, ...]:
    return tuple(f"calibration.{name}" for name in names)


def _all(family: str, *but: str) -> tuple[str, ...]:
    prefix = f"calibration.{family}."
    return tuple(p for p in PARAMETERS if p.startswith(prefix) and p.removeprefix(prefix) not in but)


FAMILIES: Final[tuple[Family, ...]] = (
    Family("gemm bf16", lambda r: r["op"] == "gemm" and r["dtype"] == "bf16", _all("gemm_bf16")),
    Family(
        "gemm fp8_block",
        lambda r: r["op"] == "gemm" and r["dtype"] == "fp8_block",
        _all("gemm_fp8") + _all("quantise"),
    ),
    Family(
        "mla_decode bf16",
        lambda r: r["op"] == "mla_decode" and r.get("kv_dtype", "bf16") == "bf16",
        _all("mla_decode", "cast", "cast_floor"),
    ),
    Family(
        "mla_decode fp8",
        lambda r: r["op"] == "mla_decode" and r.get("kv_dtype") == "fp8",
        _parameters("mla_decode.cast", "mla_decode.cast_floor"),
    ),
    Family("mla_prefill", lambda r: r["op"] == "mla_prefill", _all("mla_prefill")),
    Family("moe_experts", lambda r: r["op"] == "moe_experts", _parameters("experts.floor", "experts.expert")),
    Family("stream", lambda r: r["op"] == "stream", _all("stream")),
    Family(
        "low latency",
        lambda r: r["op"] in ("moe_dispatch", "moe_combine") and r.get("mode", "low_latency") == "low_latency",
        _all("low_latency"),
    ),
)
"""In the order of the fit: later families use what earlier ones found."""

WITHOUT_FP8: Final[tuple[Family, ...]] = (
    Family("gemm", lambda r: r["op"] == "gemm", _all("gemm_bf16")),
    *(family for family in FAMILIES if not family.name.startswith("gemm")),
)
"""The same for devices that widen FP8 weights: products of all types share their parameters."""


def families(target: Target) -> tuple[Family, ...]:
    """The families of a target, in the order of the fit."""
    return FAMILIES if target.device.fp8.matrix else WITHOUT_FP8


Start = Mapping[str, float]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; WrongRowsFile for a line that is no row with a positive `time_us`."""
    rows = []
    for number, row in numbered_rows(path):
        try:
            checked(row)
        except (UnknownOp, WrongRow) as error:
            raise WrongRowsFile(file=path, line=number, message=str(error)) from None
        time = row.get("time_us")
        if not isinstance(time, int | float) or isinstance(time, bool) or not 0 < time < math.inf:
            raise WrongRowsFile(file=path, line=number, message="has no positive time_us (microseconds)")
        rows.append(row)
    return rows


def numbered_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line number, row) of each line of a JSON Lines file that is not blank; WrongRowsFile for a wrong line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise WrongRowsFile(file=path, line=0, message=f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise WrongRowsFile(file=path, line=0, message="is not UTF-8 text") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise WrongRowsFile(file=path, line=number, message=f"not valid JSON: {reason}") from None
        if not isinstance(row, dict):
            raise WrongRowsFile(file=path, line=number, message='must be a JSON object such as {"op": "gemm", ...}')
        yield number, row


def with_values(target: Target, values: Start, source: str) -> Target:
    """The target with some parameters replaced; their kind stays, or is effective."""
    changed = dict(target.calibration)
    for path, value in values.items():
        kind = changed[path].kind if path in changed else "effective"
        changed[path] = Parameter(value, kind, source)
    return replace(target, calibration=changed)


def fit(target: Target, rows: Sequence[Row], source: str) -> Target:
    """The target with the parameters of every family that has rows fitted to them."""
    for family in families(target):
        mine = [row for row in rows if family.matches(row)]
        if mine:
            target = fit_family(target, family, mine, source)
    return target


def fit_and_check(
    target: Target, rows: Sequence[Row], source: str, count: int = 5
) -> tuple[Target, dict[str, dict[str, float]]]:
    """The fitted target, and for each family its errors before the fit and on shapes that a fit did not see.

    Raises NothingToFit when no row belongs to a family. Families with fewer than `count` shapes have no unseen errors
    (nan would not be JSON: they carry those of the fit itself).
    """
    fitted, report = fit(target, rows, source), {}
    for family in families(target):
        mine = [row for row in rows if family.matches(row)]
        if not mine:
            continue
        splits = folds(mine, count) if len({shape(row) for row in mine}) >= count else [(mine, mine)]
        unseen = unseen_errors(fitted, family, splits)
        before = errors([op_time(row, target).time_us for row in mine], [row["time_us"] for row in mine])
        report[family.name] = {
            "rows": len(mine),
            "median_before": before.median,
            "p90_before": before.p90,
            "median": unseen.median,
            "p90": unseen.p90,
        }
    if not report:
        raise NothingToFit(families=", ".join(family.name for family in FAMILIES))
    return fitted, report


def unseen_errors(target: Target, family: Family, splits: Sequence[tuple[list[Row], list[Row]]]) -> Errors:
    """Errors over the unseen sides of all (seen, unseen) splits, each with a fit of its own to the seen side."""
    predicted: list[float] = []
    measured: list[float] = []
    for seen, unseen in splits:
        fitted = fit_family(target, family, seen, "held-out check")
        predicted += [op_time(row, fitted).time_us for row in unseen]
        measured += [row["time_us"] for row in unseen]
    return errors(predicted, measured)


def fit_family(target: Target, family: Family, rows: Sequence[Row], source: str) -> Target:
    """The target with one family's parameters fitted to its rows."""
    import numpy as np
    from scipy.optimize import least_squares

    names = family.parameters
    if all(row.get("quantise_a") for row in rows):
        # Rows that always hold both kernels cannot tell their floors apart: the product's stays as it is.
        names = tuple(name for name in names if name != "calibration.gemm_fp8.floor")
    for path in names:
        if path not in target.calibration:
            raise Uncalibrated(target=target.name, parameter=path)
    start = {path: max(target.calibration[path].value, _EPSILON) for path in names}
    measured = np.log([row["time_us"] for row in rows])

    def tried(logs: Any) -> Target:
        values = {path: start[path] * math.exp(log) for path, log in zip(start, logs, strict=True)}
        return with_values(target, values, source)

    def residuals(logs: Any) -> Any:
        candidate = tried(logs)
        predicted = np.log([op_time(row, candidate).time_us for row in rows])
        return np.concatenate([(predicted - measured) / _ROW_SIGMA, logs / _PRIOR_SIGMA])

    low = [_log_ratio(PARAMETERS[path].low, value) for path, value in start.items()]
    high = [_log_ratio(PARAMETERS[path].high, value) for path, value in start.items()]
    guess = np.clip(np.zeros(len(start)), np.array(low) + 1e-6, np.array(high) - 1e-6)
    found = least_squares(
        residuals, guess, loss="soft_l1", bounds=(low, high), jac=_forward_differences(residuals), max_nfev=30
    )
    return tried(found.x)


def _forward_differences(residuals: Callable[[Any], Any], step: float = 2e-3) -> Callable[[Any], Any]:
    """Derivatives by steps wide enough to cross the model's ceilings, one column a parameter."""
    import numpy as np

    def jacobian(logs: Any) -> Any:
        base = residuals(logs)
        return np.stack([(residuals(logs + step * unit) - base) / step for unit in np.eye(len(logs))], axis=1)

    return jacobian


def _log_ratio(limit: float, value: float) -> float:
    return math.log(max(limit, _EPSILON) / value)


@dataclass(frozen=True)
class Errors:
    """Relative errors |predicted / measured - 1| over `count` rows."""

    count: int
    median: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:6.1%} {self.p90:6.1%}"


def errors(predicted: Sequence[float], measured: Sequence[float]) -> Errors:
    """Median and 90th percentile of the relative errors; nan for no rows."""
    import numpy as np

    if not measured:
        return Errors(0, math.nan, math.nan)
    wrong = np.abs(np.array(predicted) / np.array(measured) - 1)
    return Errors(len(measured), float(np.median(wrong)), float(np.percentile(wrong, 90)))


def roofline(row: Row, target: Target) -> float:
    """The plain roofline in microseconds: the larger of useful work and traffic over data-sheet rates."""
    cost = op_time(row, target)
    device, node = target.device, target.node
    dtype = "bf16" if row.get("dtype", "bf16") == "bf16" or row["op"].startswith("mla") else "fp8"
    times = [cost.flops / device.matrix_rate(dtype)]
    if row["op"].startswith("moe_") and row["op"] != "moe_experts":
        inside = row["ep"] <= node.devices
        times.append(cost.sent_bytes / (target.scale_up().bandwidth if inside else node.scale_out_per_device))
    else:
        times.append(cost.bytes / device.memory_bandwidth)
    return max(times) * 1e6


def shape(row: Row) -> tuple[tuple[str, str], ...]:
    """What identifies a row's shape, repeats of the same measurement included."""
    return tuple(sorted((key, repr(value)) for key, value in row.items() if key != "time_us"))


def folds(rows: Sequence[Row], count: int) -> list[tuple[list[Row], list[Row]]]:
    """`count` (seen, unseen) splits by shape: repeats of one shape are always on the same side."""
    shapes = sorted({shape(row) for row in rows})
    # A fixed stride over the sorted shapes spreads every dimension over all folds without a random seed.
    fold = {each: index * 7919 % len(shapes) % count for index, each in enumerate(shapes)}
    return [
        ([r for r in rows if fold[shape(r)] != index], [r for r in rows if fold[shape(r)] == index])
        for index in range(count)
    ]


def largest_unseen(rows: Sequence[Row], target: Target, share: float = 0.25) -> tuple[list[Row], list[Row]]:
    """(seen, unseen): the shapes with the longest rooflines are unseen, to test extrapolation."""
    ordered = sorted(rows, key=lambda row: (roofline(row, target), shape(row)))
    cut = round(len(ordered) * (1 - share))
    seen = {shape(row) for row in ordered[:cut]}
    return [r for r in rows if shape(r) in seen], [r for r in rows if shape(r) not in seen]
