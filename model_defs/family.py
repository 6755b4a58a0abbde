"""What a model family is to the frontend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moec.model_defs.names import Names


def _decoder(config: Any) -> Any:
    from moec.model_defs.decoder import Model

    return Model(config)


@dataclass(frozen=True)
class Family:
    """A model family.

    `config(raw, name)` reads a `config.json`, `tensors` names the checkpoint's tensors of each parameter,
    `model(config)` is the definition on the meta device: the shared decoder unless the family has its own.
    `drafting(config)`, of a family with multi-token prediction, is the pair of the definition that returns its hidden
    states too, and of the module that drafts from them.
    """

    name: str
    model_types: tuple[str, ...]
    config: Callable[[Mapping[str, Any], str], Any]
    tensors: Names
    model: Callable[[Any], Any] = _decoder
    drafting: Callable[[Any], tuple[Any, Any]] | None = None
