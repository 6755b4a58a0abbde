"""Files: loads and co-activation in, placements out and in. Nothing is ever unpickled.

A placement is written as JSON or, by the suffix, as npz with the same fields:

    format                   "moec-placement"
    version                  1
    experts, devices, nodes  the shape; slots per device = slots / devices
    physical_to_logical_map  int [layers][slots]: the expert in each slot, devices one after the other
    replica_shares           float [layers][slots]: part of its expert's tokens that the slot takes

SGLang's `--init-expert-location` passes every key of its JSON file on as an argument, so that file holds
`physical_to_logical_map` and nothing else. It has a row for each layer of the model, dense ones included.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from moec.files import write_whole
from moec.passes.placement import errors
from moec.passes.placement.placement import Placement, normalised_shares
from moec.passes.placement.problem import Floats, numeric_array

_FORMAT, _VERSION = "moec-placement", 1
_LOAD_NAMES = ("loads", "logical_count")
_PAIR_NAMES = ("coactivation",)
_MOST = 1 << 31
_TOO_LARGE = "it says that it holds more than there is memory"


def read_loads(path: Path) -> Floats:
    """Loads [layers, experts] from .npy, .npz or .json.

    An npz or a JSON object holds them as `loads` or `logical_count` (the name in SGLang's recordings); an npz with one
    array needs no name. Raises `UnreadableFile`, and what `numeric_array` raises.
    """
    return numeric_array(path.name, _read(path, _LOAD_NAMES), 2, "[layers, experts]")


def read_coactivation(path: Path, layers: int, experts: int) -> Floats:
    """Co-activation [layers, experts, experts] from .npy, .npz or .json (`coactivation`)."""
    array = numeric_array(path.name, _read(path, _PAIR_NAMES), 3, "[layers, experts, experts]")
    if array.shape != (layers, experts, experts):
        raise errors.WrongRank(name=path.name, expected=[layers, experts, experts], shape=list(array.shape))
    return array


def read_optional(path: Path, name: str) -> Any:
    """The array of that name in a file of several, as numpy or nested lists; None when there is none."""
    if path.suffix == ".npy":
        return None
    try:
        return _read(path, (name,), or_only=False)
    except errors.NoSuchArray:
        return None


def _read(path: Path, names: tuple[str, ...], or_only: bool = True) -> Any:
    """The wanted array of a file, as numpy or nested lists; a file's only one may have any name with `or_only`."""
    try:
        if path.suffix == ".json":
            return _named(path, json.loads(path.read_text(encoding="utf-8")), names, or_only)
        if path.suffix not in (".npy", ".npz"):
            raise errors.UnreadableFile(path=path, reason="expected a file named .npy, .npz or .json")
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return _named(path, loaded, names, or_only)
    except OSError as error:
        raise errors.UnreadableFile(path=path, reason=error.strerror or error) from None
    except ValueError as error:
        # numpy reports pickled content and broken headers, json bad syntax, as a ValueError.
        pickled = "allow_pickle" in str(error) or "pickle" in str(error)
        reason = "it holds pickled objects, which are never loaded" if pickled else f"not valid {path.suffix[1:]}"
        raise errors.UnreadableFile(path=path, reason=reason) from None
    except (zipfile.BadZipFile, EOFError, RecursionError):
        raise errors.UnreadableFile(path=path, reason=f"not valid {path.suffix[1:]}") from None
    except MemoryError:
        raise errors.UnreadableFile(path=path, reason=_TOO_LARGE) from None


def _named(path: Path, content: Any, names: tuple[str, ...], or_only: bool) -> Any:
    if isinstance(content, list) and or_only:
        return content
    if isinstance(content, list):
        raise errors.NoSuchArray(path=path, reason="no names in it")
    if not hasattr(content, "keys"):
        raise errors.UnreadableFile(path=path, reason="expected nested lists or an object of arrays")
    keys = list(content.keys())
    for name in names:
        if name in keys:
            return content[name]
    if len(keys) == 1 and not isinstance(content, dict) and or_only:
        return content[keys[0]]
    raise errors.NoSuchArray(path=path, reason=f"no {' or '.join(names)} in it (it has {', '.join(keys) or 'nothing'})")


def as_dict(placement: Placement) -> dict[str, Any]:
    """The fields of a placement file."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "experts": placement.experts,
        "devices": placement.devices,
        "nodes": placement.nodes,
        "physical_to_logical_map": placement.physical_to_logical_map.tolist(),
        "replica_shares": placement.replica_shares.tolist(),
    }


def write_placement(placement: Placement, path: Path) -> None:
    """Write a placement as JSON, or as npz when `path` ends so."""
    fields = as_dict(placement)
    if path.suffix == ".npz":
        write_npz(path, fields)
    else:
        write_whole(path, json.dumps(fields) + "\n")


def check_sglang_name(path: Path) -> None:
    """Raise NotForSglang for a name under which SGLang would not look for a file (any other is JSON text to it)."""
    if path.suffix != ".json":
        raise errors.NotForSglang(path=path)


def write_sglang(placement: Placement, path: Path, *, dense_layers: int = 0) -> None:
    """Write the file that SGLang's `--init-expert-location` reads; raises NotForSglang.

    `dense_layers` leading rows stand for the model's dense layers (3 in DeepSeek-V3); what they say is never used.
    """
    check_sglang_name(path)
    trivial = (np.arange(placement.slots) % placement.experts).tolist()
    rows = [trivial] * dense_layers + placement.physical_to_logical_map.tolist()
    write_whole(path, json.dumps({"physical_to_logical_map": rows}) + "\n")


def read_placement(
    path: Path, *, devices: int | None = None, experts: int | None = None, nodes: int = 1, dense_layers: int = 0
) -> Placement:
    """Read a placement in either form.

    `devices`, and `experts` if some could be missing, are needed for SGLang's form, which does not say them; its
    shares are even, and its `dense_layers` leading rows are dropped. Raises `UnreadableFile` or `BadPlacement`.
    """
    fields = _read_fields(path)
    if "physical_to_logical_map" not in fields:
        raise errors.BadPlacement(path=path, reason="no physical_to_logical_map in it")
    if fields.get("version", _VERSION) != _VERSION:
        raise errors.BadPlacement(path=path, reason=f"version {fields['version']}, this moec reads version {_VERSION}")
    values = numeric_array(path.name, fields["physical_to_logical_map"], 2, "[layers, slots]")
    if "format" not in fields:
        values = values[dense_layers:]
    if not len(values) or not ((values == np.floor(values)) & (values >= 0) & (values <= _MOST)).all():
        raise errors.BadPlacement(path=path, reason="experts are given by whole numbers, for one layer or more")
    mapping = values.astype(np.int64)
    count = _whole(path, fields, "experts", experts if experts is not None else int(mapping.max()) + 1)
    width = _whole(path, fields, "devices", devices)
    homes = _whole(path, fields, "nodes", nodes)
    if mapping.shape[1] % width or width % homes:
        raise errors.BadPlacement(
            path=path, reason=f"{mapping.shape[1]} slots, {width} devices and {homes} nodes do not divide"
        )
    if count > mapping.shape[1]:
        raise errors.BadPlacement(path=path, reason=f"{count} experts do not fit {mapping.shape[1]} slots")
    for layer, row in enumerate(mapping):
        missing = np.setdiff1d(np.arange(count), row)
        if len(missing) or row.max() >= count:
            what = f"expert {missing[0]} stands in no slot" if len(missing) else f"expert {row.max()} of {count}"
            raise errors.BadPlacement(path=path, reason=f"layer {layer}: {what}")
    weight = np.ones(mapping.shape)
    if "replica_shares" in fields:
        weight = numeric_array(path.name, fields["replica_shares"], 2, "[layers, slots]")
        if weight.shape != mapping.shape:
            raise errors.BadPlacement(path=path, reason="replica_shares and physical_to_logical_map differ in shape")
    return Placement(mapping, normalised_shares(mapping, weight, count), count, width, homes)


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.UnreadableFile(path=path, reason=error.strerror or error) from None
    except (ValueError, zipfile.BadZipFile, EOFError, RecursionError):
        raise errors.UnreadableFile(path=path, reason=f"not valid {path.suffix[1:] or 'json'}") from None
    except MemoryError:
        raise errors.UnreadableFile(path=path, reason=_TOO_LARGE) from None
    if not isinstance(fields, dict):
        raise errors.BadPlacement(path=path, reason="expected an object")
    return fields


def _whole(path: Path, fields: dict[str, Any], name: str, fallback: int | None) -> int:
    value = fields.get(name, fallback)
    if value is None:
        raise errors.BadPlacement(path=path, reason=f"it does not say how many {name} there are")
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or number != value:
        raise errors.BadPlacement(path=path, reason=f"{name} must be a whole number above 0")
    return number


def write_npz(path: Path, fields: dict[str, Any]) -> None:
    """Write arrays whole or not at all; raises NotWritten."""
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in fields.items()}
    write_whole(path, lambda file: np.savez_compressed(file, **arrays))
