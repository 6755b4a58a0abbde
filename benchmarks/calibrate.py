"""Fits the cost model to measured kernel times and says how well it predicts shapes that the fit did not see.

    python benchmarks/calibrate.py MEASUREMENTS.jsonl --target h100                     # report
    python benchmarks/calibrate.py MEASUREMENTS.jsonl --target h100 --write targets/h100.yaml --source "..."

Rows are `moec cost` rows with `time_us`. The report has, per family, the median and 90th percentile of the relative
error on unseen shapes (five folds by shape; and the quarter with the longest times unseen), beside the plain roofline.
With `--published ROWS --on TARGET` it then predicts published rows of another target with the fitted parameters.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moec import targets
from moec.files import write_whole
from moec.targets.cost import Row, op_time
from moec.targets.cost.fit import (
    FAMILIES,
    errors,
    fit,
    folds,
    largest_unseen,
    read_rows,
    roofline,
    unseen_errors,
    with_values,
)
from moec.targets.describe import calibration_text
from moec.targets.schema import Target

FOLDS = 5


def report(target: Target, rows: Sequence[Row]) -> None:
    """Print a line a family. `target` carries the fit of all rows, so later families build on fitted earlier ones."""
    print(f"{'':18}{'rows':>6}   {'unseen shapes':>14}   {'longest unseen':>14}   {'roofline':>14}")
    print(f"{'':18}{'':>6}" + f"   {'median':>7}{'p90':>7}" * 3)
    for family in FAMILIES:
        mine = [row for row in rows if family.matches(row)]
        if not mine:
            continue
        shuffled = unseen_errors(target, family, folds(mine, FOLDS))
        longest = unseen_errors(target, family, [largest_unseen(mine, target)])
        plain = errors([roofline(row, target) for row in mine], [row["time_us"] for row in mine])
        print(f"{family.name:18}{len(mine):6}   {shuffled!s:>14}   {longest!s:>14}   {plain!s:>14}", flush=True)


def report_published(target: Target, rows: Sequence[Row]) -> None:
    """Print a line an op: errors of the fitted parameters on another target's published rows."""
    print(f"\npublished rows on {target.name}, with parameters fitted elsewhere")
    for op in dict.fromkeys((row["op"], row.get("mode", "")) for row in rows):
        mine = [row for row in rows if (row["op"], row.get("mode", "")) == op]
        measured = [row["time_us"] for row in mine]
        found = errors([op_time(row, target).time_us for row in mine], measured)
        plain = errors([roofline(row, target) for row in mine], measured)
        print(f"{' '.join(op):26}{len(mine):6}   {found!s:>14}   roofline {plain!s:>14}")


def write(path: Path, target: Target) -> None:
    """Replace the calibration section at the end of a target file."""
    head = path.read_text(encoding="utf-8").split("\ncalibration:\n")[0].rstrip("\n")
    write_whole(path, f"{head}\n{calibration_text(target)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--target", default="h100")
    parser.add_argument("--source", default="", help="where the rows are from; becomes the parameters' source")
    parser.add_argument("--write", type=Path, help="target file whose calibration section is replaced")
    parser.add_argument("--published", type=Path)
    parser.add_argument("--on", default="h800")
    args = parser.parse_args()
    rows = read_rows(args.rows)
    target = fit(targets.load(args.target), rows, args.source or f"fitted to {args.rows.name}")
    if args.write:
        write(args.write, target)
        print(f"wrote {args.write}", flush=True)
    report(target, rows)
    if args.published:
        other = targets.load(args.on)
        values = {path: parameter.value for path, parameter in target.calibration.items()}
        report_published(with_values(other, values, "fitted"), read_rows(args.published))


if __name__ == "__main__":
    main()
