"""Model folders and configurations that cannot be compiled: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoint import CONFIG

from moec.errors import InputError
from moec.frontend import find_model, trace_model
from moec.model_defs.registry import preset_config, preset_names

Refused = Callable[..., str]


def spoil(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def compiled(folder: object, tmp_path: Path) -> tuple[object, ...]:
    return "compile", folder, "--out", tmp_path / "x.moec"


def test_no_such_folder(refused: Refused, tmp_path: Path) -> None:
    assert "no such folder" in refused(*compiled(tmp_path / "nope", tmp_path))
    assert "is a file" in refused(*compiled(__file__, tmp_path))
    assert "no folder and no preset" in refused(*compiled("x" * 5000, tmp_path))
    assert "no such folder" in refused(*compiled("x/" * 5000, tmp_path))


def test_unknown_preset(refused: Refused, tmp_path: Path) -> None:
    assert "did you mean deepseek-v3" in refused(*compiled("deepseek-v4", tmp_path))
    assert "deepseek-v3" in refused("models", "show", "deepsek-v3")


def test_no_config(refused: Refused, copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").unlink()
    assert "holds no config.json" in refused(*compiled(copy, tmp_path))


@pytest.mark.parametrize("text", ["{", "", "\xff", "[1]", "{}", "null", "[" * 100000])
def test_config_is_no_configuration(refused: Refused, copy: Path, tmp_path: Path, text: str) -> None:
    (copy / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refused(*compiled(copy, tmp_path))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "deepseek_v9"}, ["'deepseek_v9' is not supported", "deepseek_v3"]),
        ({"model_type": "xyz"}, ["'xyz' is not supported", "known: "]),
        ({"model_type": ["deepseek_v3"]}, ["is not supported"]),
        ({"sliding_window": 128}, ["'sliding_window' is not known"]),
        ({"n_routed_expert": 8}, ["did you mean n_routed_experts"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "silu"]),
        ({"use_mla": False}, ["use_mla"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq = 2"]),
        ({"scoring_func": "tanh"}, ["'tanh'", "sigmoid"]),
        ({"topk_method": "noaux"}, ["'noaux'", "noaux_tc"]),
        ({"topk_method": {}}, ["topk_method"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8}}, ["'longrope'", "yarn"]),
        ({"rope_scaling": {"type": "yarn", "factor": "a"}}, ["factor must be a positive number"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "alpha": 1}}, ["'alpha'"]),
        ({"rope_scaling": "yarn"}, ["object"]),
        ({"rope_theta": -1}, ["rope_theta"]),
        ({"hidden_size": None}, ["'hidden_size' is missing"]),
        ({"hidden_size": "16"}, ["hidden_size must be a positive integer, got '16'"]),
        ({"hidden_size": 0}, ["hidden_size"]),
        ({"hidden_size": 1 << 70}, ["hidden_size must be at most"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"routed_scaling_factor": 10**400}, ["routed_scaling_factor"]),
        ({"norm_topk_prob": "yes"}, ["norm_topk_prob must be true or false"]),
        ({"qk_rope_head_dim": 5}, ["must be even"]),
        ({"n_group": 3}, ["do not divide into 3 groups"]),
        ({"topk_group": 2}, ["topk_group 2 exceeds"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok 9 exceeds the 4"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id"]),
    ],
)
def test_unsupported_values(
    refused: Refused, copy: Path, tmp_path: Path, changes: dict[str, Any], names: list[str]
) -> None:
    line = refused(*compiled(spoil(copy, **changes), tmp_path))
    assert all(name in line for name in names), line


def test_null_fields_of_other_models_are_no_error(copy: Path) -> None:
    assert find_model(str(spoil(copy, sliding_window=None))).config.hidden_size == 16


def test_presets_are_read() -> None:
    for name in preset_names():
        assert find_model(name).config.hidden_size == preset_config(name)["hidden_size"]


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("num_hidden_layer=4", "did you mean num_hidden_layers"),
        ("num_hidden_layers", "wants KEY=VALUE"),
        ("=4", "wants KEY=VALUE"),
        ("num_hidden_layers=two", "must be a positive integer, got 'two'"),
        ("num_hidden_layers=2.5", "must be a positive integer, got 2.5"),
        ("num_hidden_layers=" + "[" * 100000, "must be a positive integer"),
        ("model_type=mamba", "'mamba' is not supported"),
        ("a\nb=1", "--set a\\nb"),
    ],
)
def test_wrong_settings(refused: Refused, model_folder: Path, tmp_path: Path, setting: str, names: str) -> None:
    assert names in refused(*compiled(model_folder, tmp_path), "--set", setting)


def test_names_with_line_breaks_stay_on_one_line(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "a\nb\x1b[31m"
    assert "no such folder" in refused(*compiled(folder, tmp_path))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"hidden_act": "gelu"}))
    assert "a\\nb\\x1b" in refused(*compiled(folder, tmp_path))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.integers(-(1 << 80), 1 << 80),
    st.floats(),
    st.sampled_from(["", "yarn", "default", "greedy", "noaux_tc", "softmax", "silu", "1"]),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(
        st.sampled_from(["type", "rope_type", "factor", "mscale", "original_max_position_embeddings", "x"]),
        st.one_of(st.none(), st.just("yarn"), st.integers(-1, 4), st.floats(), st.just([])),
        max_size=4,
    ),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.sampled_from([*CONFIG, "topk_method", "scoring_func", "rope_parameters"]), VALUES, max_size=3)
)
def test_random_configurations_compile_or_are_refused(tmp_path_factory: Any, changes: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        trace_model(find_model(str(spoil(folder, **changes))))
    except InputError as error:
        assert "\n" not in str(error)
