"""Any wrong value in any field of a config.json is one line, for every family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from moec.errors import InputError
from moec.model_defs.registry import family_of, preset_config, preset_names

WRONG = [None, True, -1, 0, 0.5, 1e308, "x", [], ["x"], {}, {"a": 1}]
MODELS = {str(preset_config(name)["model_type"]): name for name in preset_names()}


def spoiled(value: Any) -> Iterator[Any]:
    """Copies of a configuration, each with one place missing or replaced by something wrong."""
    if not isinstance(value, dict):
        return
    for key in value:
        for wrong in (*WRONG, *spoiled(value[key])):
            yield {**value, key: wrong}
        yield {other: value[other] for other in value if other != key}


@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_wrong_values_are_one_line(model_type: str) -> None:
    refused = 0
    for raw in spoiled(preset_config(MODELS[model_type])):
        try:
            family_of(raw, "m").config(raw, "m")
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100
