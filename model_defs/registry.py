"""Families and presets: which module, configuration reader and tensor names a model has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from moec.errors import InputError, near
from moec.model_defs.family import Family
from moec.plugins import plugins

PRESETS = Path(__file__).parent / "presets"
DATA = Path(__file__).parent / "presets_data"


class UnknownModel(InputError):
    """A model that is neither a preset, a folder nor a definition."""

    template: ClassVar[str] = "unknown model {name!r}: no folder and no preset{hint}"


class UnknownArchitecture(InputError):
    """A `config.json` of a family that moec does not have."""

    template: ClassVar[str] = "{where}: model_type {found!r} is not supported{hint}"


BUILT_IN = (
    "ernie4_5_moe", "gpt_oss", "granitemoe", "hunyuan_v1_moe", "llama", "llama4", "minimax_m2", "mixtral", "noaux",
    "olmoe", "phimoe", "qwen_moe",
)  # fmt: skip
"""Modules of `families`."""


def families() -> list[Family]:
    """Built-in families, then those of installed packages (entry points `moec.models`)."""
    from moec.model_defs.deepseek_v3 import checkpoint, config, sparse

    def model(c: Any) -> Any:
        from moec.model_defs.deepseek_v3.model import Model

        return Model(c)

    def drafting(c: Any) -> tuple[Any, Any]:
        from moec.model_defs.deepseek_v3.model import Draft, Model

        return Model(c, hidden=True), Draft(c)

    types = ("deepseek_v3", "deepseek_v2", "kimi_k2")
    found = [Family("deepseek_v3", types, config.from_hf, checkpoint.TENSORS, model, drafting)]
    found.append(Family("deepseek_v32", ("deepseek_v32",), sparse.read, checkpoint.TENSORS, model))
    for name in BUILT_IN:
        found += import_module(f"moec.model_defs.families.{name}").FAMILIES
    return found + [family for _, family in plugins("moec.models", [f.name for f in found])]


def preset_names() -> list[str]:
    """Names of the presets, sorted."""
    return sorted({p.stem for p in PRESETS.glob("*.json")} | {p.parent.name for p in DATA.glob("*/config.json")})


def preset_config(name: str) -> dict[str, Any]:
    """The raw `config.json` of a preset; raises UnknownModel with near names."""
    if name not in preset_names():
        raise UnknownModel(name=name, hint=near(name, preset_names()))
    path = DATA / name / "config.json"
    if not path.exists():
        path = PRESETS / f"{name}.json"
    loaded = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def published(name: str) -> dict[str, Any] | None:
    """What the publisher of a preset's model states: total and active parameters in billions, source; see the file."""
    import yaml

    facts = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))
    found = facts.get(name)
    assert found is None or isinstance(found, dict)
    return found


def preset_folder(name: str) -> Path | None:
    """The folder with the weights that ship with a preset, if they do."""
    folder = DATA / name
    return folder if name in preset_names() and (folder / "config.json").exists() else None


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """The family of a raw configuration; raises UnknownArchitecture with the nearest names."""
    found = raw.get("model_type")
    for family in families():
        if found in family.model_types:
            return family
    known = [t for f in families() for t in f.model_types]
    raise UnknownArchitecture(where=where, found=found, hint=near(str(found), known))
