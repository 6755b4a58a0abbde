"""`moec cost`: what one op, or each row of a file, costs on a target, and what bounds it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.errors import InputError

if TYPE_CHECKING:
    from moec.targets.cost import Cost


class WrongCostUsage(InputError):
    """Arguments of `moec cost` that do not make up a row."""

    template = "moec cost: {message}"


_EXAMPLES = """\
moec cost gemm m=128 n=4096 k=7168 dtype=fp8_block --target h800
moec cost --rows rows.jsonl --target mine.yaml
"""


def register(app: typer.Typer) -> None:
    """Add `moec cost`."""
    app.command("cost", epilog=_EXAMPLES)(cost)


def cost(
    words: Annotated[list[str] | None, typer.Argument(metavar="OP KEY=VALUE...", help="The op and its keys.")] = None,
    target: Annotated[str, typer.Option(help="A shipped target or a file.")] = "h800",
    rows: Annotated[Path | None, typer.Option(help="JSON Lines of rows; - for standard input.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict the time of an op on a target and what bounds it.

    `moec cost gemm m=128 n=4096 k=7168 dtype=fp8_block --target h800`; without arguments, the ops and their keys.
    With --rows, one JSON object a line in the order of the input.
    """
    from moec import targets

    if rows is not None:
        if words:
            raise WrongCostUsage(message="give either an op or --rows, not both")
        _rows(rows, targets.load(target))
    elif not words:
        _reference()
    else:
        from moec.targets.cost import op_time

        row = _row(words)
        found = op_time(row, targets.load(target))
        if as_json:
            print(json.dumps({"op": row["op"], "target": target, **found.as_json()}))
        else:
            _table(row, target, found)


def _row(words: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"op": words[0]}
    for word in words[1:]:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise WrongCostUsage(message=f"{word!r} is not key=value")
        if name in row:
            raise WrongCostUsage(message=f"{name} is given twice")
        row[name] = _value(text)
    return row


def _value(text: str) -> Any:
    """A number, true or false, a list written `256,512,0`, or the text itself."""
    if "," in text:
        return [_value(part) for part in text.split(",")]
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text


def _rows(path: Path, target: Any) -> None:
    from moec.targets.cost import UnknownOp, WrongRow, WrongRowsFile, op_time
    from moec.targets.cost.fit import numbered_rows

    name = Path("/dev/stdin") if str(path) == "-" else path
    answers = []
    for number, row in numbered_rows(name):
        try:
            answers.append(json.dumps({"op": row.get("op"), **op_time(row, target).as_json()}))
        except (UnknownOp, WrongRow) as error:
            raise WrongRowsFile(file=path, line=number, message=str(error)) from None
    sys.stdout.writelines(f"{answer}\n" for answer in answers)


def _table(row: dict[str, Any], target: str, found: Cost) -> None:
    print(f"{row['op']} on {target}: {found.time_us:.2f} us, {found.bound} bound")
    for part, time in sorted(found.parts.items(), key=lambda item: -item[1]):
        print(f"  {part:8} {time:10.2f} us alone")
    seconds = found.time_us * 1e-6
    if seconds and found.flops:
        print(f"  {found.flops / 1e9:.4g} GFLOP, {found.flops / seconds / 1e12:.4g} TFLOP/s")
    if seconds and found.bytes:
        print(f"  {found.bytes / 1e6:.4g} MB of memory traffic, {found.bytes / seconds / 1e9:.4g} GB/s")
    if seconds and found.sent_bytes:
        print(f"  {found.sent_bytes / 1e6:.4g} MB sent, {found.sent_bytes / seconds / 1e9:.4g} GB/s")
    if found.sms:
        print(f"  {found.sms} SMs busy with communication")


def _reference() -> None:
    from moec.targets.cost import OPS

    for name, op in OPS.items():
        print(f"{name}: {op.doc}")
        for key, known in op.keys.items():
            choices = f" ({' | '.join(known.choices)})" if known.choices else ""
            default = "" if known.required else f" [{json.dumps(known.default)}]"
            print(f"  {key:14} {known.doc}{choices}{default}")
