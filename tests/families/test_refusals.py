"""What is refused costs one line that says what and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_configs import make_model, save_model

import moec
from moec.errors import InputError
from moec.passes.base import PassError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model("mixtral", 0, tmp_path / "model")
    return tmp_path / "model"


def changed(folder: Path, **fields: Any) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return str(folder)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    return text


def test_unsupported_architecture_names_the_nearest(folder: Path) -> None:
    assert "did you mean mixtral" in refused(lambda: moec.trace(changed(folder, model_type="mixtrel")))


def test_unknown_rope_type(folder: Path) -> None:
    rope = {"rope_type": "spiral", "rope_theta": 1e4}
    assert "'spiral' is not supported, only default, linear" in refused(
        lambda: moec.trace(changed(folder, rope_parameters=rope))
    )


@pytest.mark.parametrize(
    ("field", "value"), [("attention_sink_size", 4), ("hidden_act", "cosine"), ("num_experts_per_tok", 99)]
)
def test_fields_that_change_the_mathematics(field: str, value: Any, folder: Path) -> None:
    assert field in refused(lambda: moec.trace(changed(folder, **{field: value})))


def test_code_in_the_folder_never_runs(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')")
    moec.trace(changed(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}))
    refused(lambda: moec.trace(changed(folder, model_type="evil")))
    assert not mark.exists()


def test_config_and_weights_that_disagree(folder: Path) -> None:
    text = changed(folder, intermediate_size=999)
    plan = moec.trace(text).optimize("cpu", context=16)
    message = refused(lambda: plan.compile(folder.parent / "m.moec"))
    assert "has shape" in message and "999" in message
    assert not (folder.parent / "m.moec").exists()


def test_a_cache_per_head_has_no_fp8_layout(folder: Path) -> None:
    with pytest.raises(PassError, match=r"has no layout.*or bf16"):
        moec.trace(str(folder)).optimize("cpu", context=16, passes=["fp8-cast{cache=fp8}"])


def test_harmless_fields_are_listed(folder: Path) -> None:
    assert "router_aux_loss_coef" in moec.trace(str(folder)).source.config.ignored


def test_models_are_drawn_from_their_seed() -> None:
    one, same, other = (make_model("llama", s).config.to_dict() for s in (4, 4, 5))
    assert one == same != other
