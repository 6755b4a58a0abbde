"""A target's numbers with their sources: as a table, as JSON, and as a file that loads to the same target."""

from __future__ import annotations

import json
from typing import Any

from moec.targets import units
from moec.targets.document import Leaf
from moec.targets.fields import FIELDS
from moec.targets.load import load, merged_leaves
from moec.targets.parameters import PARAMETERS
from moec.targets.schema import Target

Leaves = dict[str, Leaf]


def leaves_of(name: str, measure: bool = False) -> Leaves:
    """Every value of a target by its path; with `measure`, this CPU's bandwidth is measured if assumed.

    Raises what `load` raises.
    """
    load(name)
    leaves = merged_leaves(name)
    bandwidth = "device.memory.bandwidth"
    if measure and leaves[bandwidth].file == "this-machine":
        from moec.targets.detect import detected_leaves

        leaves[bandwidth] = detected_leaves(measure=True)[bandwidth]
    order = {path: index for index, path in enumerate((*FIELDS, *PARAMETERS))}
    return dict(sorted(leaves.items(), key=lambda item: order[item[0]]))


def _shown(path: str, leaf: Leaf) -> str:
    if isinstance(leaf.value, bool):
        return "true" if leaf.value else "false"
    if isinstance(leaf.value, float):
        if path in PARAMETERS:
            return units.show(leaf.value, PARAMETERS[path].dimension, _counted(path))
        return units.show(leaf.value, FIELDS[path].dimension, FIELDS[path].counted)
    return ", ".join(leaf.value) if isinstance(leaf.value, tuple) else leaf.value


def _counted(path: str) -> str:
    """What a count of the cost model counts."""
    return "SM" if path.endswith(".sms") else "row"


def as_table(leaves: Leaves) -> str:
    """One line a value: path, value, source."""
    rows = [(path, _shown(path, leaf), leaf.source) for path, leaf in leaves.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{path:{widths[0]}}  {value:{widths[1]}}  {source}".rstrip() for path, value, source in rows)


def as_json(name: str, leaves: Leaves) -> dict[str, Any]:
    """`{"name", "values": {path: {"value" (base units), "unit", "source"}}}`."""
    base = {"bytes": "B", "bandwidth": "B/s", "rate": "FLOP/s", "time": "s", "frequency": "Hz", "bits": "bit"}
    values: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        values[path] = {"value": leaf.value}
        if isinstance(leaf.value, float):
            known = PARAMETERS.get(path) or FIELDS[path]
            values[path] |= {"unit": base.get(known.dimension, ""), "source": leaf.source}
            values[path] |= {"kind": leaf.kind} if leaf.kind else {}
    return {"name": load(name).name, "values": values}


def as_yaml(name: str, leaves: Leaves) -> str:
    """A target file without `extends` that loads to the same numbers."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        *parents, last = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = _entry(path, leaf)
    return "\n".join([f"name: {json.dumps(load(name).name)}", *_lines(tree, 0)]) + "\n"


def _entry(path: str, leaf: Leaf) -> str:
    if not isinstance(leaf.value, float) or isinstance(leaf.value, bool):
        if isinstance(leaf.value, tuple):
            return f"[{', '.join(leaf.value)}]"
        return _shown(path, leaf) if isinstance(leaf.value, bool) else json.dumps(leaf.value)
    kind = f", kind: {leaf.kind}" if leaf.kind else ""
    return f"{{value: {_shown(path, leaf)}, source: {json.dumps(leaf.source)}{kind}}}"


def _lines(tree: dict[str, Any], depth: int) -> list[str]:
    lines = []
    for key, node in tree.items():
        indent = "  " * depth
        if isinstance(node, dict):
            lines += [f"{indent}{key}:", *_lines(node, depth + 1)]
        else:
            lines.append(f"{indent}{key}: {node}")
    return lines


def calibrated_yaml(name: str, calibrated: Target) -> str:
    """A target file without `extends`: the values of target `name`, with the parameters of `calibrated`."""
    leaves = {path: leaf for path, leaf in leaves_of(name).items() if path not in PARAMETERS}
    return as_yaml(name, leaves) + calibration_text(calibrated)


def calibration_text(target: Target) -> str:
    """The `calibration:` section of a target file that holds the target's parameters, to four digits."""
    lines, section = ["calibration:"], ""
    for path, known in PARAMETERS.items():
        parameter = target.calibration.get(path)
        if parameter is None:
            continue
        _, family, name = path.split(".")
        if family != section:
            lines.append(f"  {family}:")
            section = family
        value = units.show(float(f"{parameter.value:.4g}"), known.dimension, _counted(path))
        source = json.dumps(parameter.source)
        lines.append(f"    {name}: {{value: {value}, kind: {parameter.kind}, source: {source}}}")
    return "\n".join(lines) + "\n"
