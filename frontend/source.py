"""Where a model comes from: a preset, a Hugging Face folder, or `file.py:Model`."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moec.errors import InputError, near, printable
from moec.model_defs.family import Family
from moec.model_defs.registry import family_of, preset_config, preset_folder


class FolderError(InputError):
    """A model folder that cannot be used."""

    template: ClassVar[str] = "{folder}: {message}"


class DefinitionError(InputError):
    """A Python file that declares no usable model."""

    template: ClassVar[str] = "{file}: {message}"


class OverrideError(InputError):
    """A `--set` that does not fit the model."""

    template: ClassVar[str] = "--set {key}: {message}"


@dataclass(frozen=True)
class ModelSource:
    """A model before tracing: its name, family, configuration, and the folder of its weights if it has one."""

    name: str
    family: Family
    config: Any
    raw: Mapping[str, Any]
    folder: Path | None = None


def find_model(spec: str, overrides: Mapping[str, str] | None = None) -> ModelSource:
    """Resolve a model given on the command line; `overrides` replace fields of its configuration.

    Raises UnknownModel, UnknownArchitecture, FolderError, ConfigError or OverrideError. Runs no code of a model folder;
    `FILE.py:Model` runs that file, since it was named.
    """
    file, colon, attribute = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_definition(Path(file), attribute, overrides or {})
    path, folder = Path(spec), preset_folder(spec)
    if os.path.isdir(path) or "/" in spec:
        raw, folder, name = _read_config(path), path, printable(path.resolve().name)
    else:
        raw, name = preset_config(spec), spec
    raw = {**raw, **_overrides(raw, overrides or {})}
    family = family_of(raw, printable(spec))
    return ModelSource(name, family, family.config(raw, name), raw, folder)


def _from_definition(file: Path, attribute: str, overrides: Mapping[str, str]) -> ModelSource:
    """A model that a Python file declares: a class with `config` (as in config.json), `tensors`, and `read_config`.

    `read_config(raw, name)` makes the object that the class is built with; without it the family of the configuration's
    `model_type` reads it. `tensors` defaults to that family's names too.
    """
    if not file.is_file():
        raise DefinitionError(file=file, message="no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DefinitionError(file=file, message=f"fails with {type(error).__name__}: {printable(error)}") from None
    model: Any = getattr(module, attribute, None)
    config = getattr(model, "config", None)
    if not callable(model) or not isinstance(config, Mapping):
        classes = [n for n, v in vars(module).items() if isinstance(getattr(v, "config", None), Mapping)]
        hint = near(attribute, classes)
        raise DefinitionError(file=file, message=f"declares no model class {attribute} with a `config`{hint}")
    raw = {**config, **_overrides(config, overrides)}
    base = family_of(raw, printable(file))
    read = getattr(model, "read_config", base.config)
    tensors = getattr(model, "tensors", base.tensors)
    family = Family(attribute, base.model_types, read, tensors, model)
    return ModelSource(attribute, family, read(raw, attribute), raw)


def _read_config(folder: Path) -> dict[str, Any]:
    if not os.path.isdir(folder):
        message = "is a file, not a model folder" if os.path.exists(folder) else "no such folder"
        raise FolderError(folder=folder, message=message)
    path = folder / "config.json"
    if not path.is_file():
        raise FolderError(folder=folder, message="holds no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FolderError(folder=folder, message=f"config.json cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FolderError(folder=folder, message=f"config.json is not JSON: {printable(error)}") from None
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise FolderError(folder=folder, message="config.json has no model_type")
    return raw


def _overrides(raw: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, text in given.items():
        if key not in raw:
            raise OverrideError(key=printable(key), message=f"no such field{near(key, list(raw))}")
        try:
            out[key] = json.loads(text)
        except (ValueError, RecursionError):
            out[key] = text
    return out
