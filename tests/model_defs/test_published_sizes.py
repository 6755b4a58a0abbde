"""Parameters of the presets against those that their publishers state, and the cache's bytes by hand."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from moec.cli.models import list_models, model_facts
from moec.model_defs.registry import preset_names, published

PUBLISHED = [name for name in preset_names() if published(name) is not None]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    facts = model_facts(name)
    stated = published(name)
    assert stated is not None and stated["source"]
    for i, name_of in enumerate(("total", "active")):
        number = Decimal(str(stated[name_of]))
        # As many digits as the publisher prints, of a count of the same things.
        unit = float(stated["unit"][i]) if "unit" in stated else 10.0 ** int(number.as_tuple().exponent)
        ours = facts[("parameters", "active_parameters")[i]] / 1e9 - stated.get("beside", (0, 0))[i]
        low, high = (0.0, unit) if name_of in stated.get("cut", ()) else (-unit / 2, unit / 2)
        assert low <= ours - float(number) <= high * 1.001, name_of


def test_every_preset_of_a_published_model_is_in_the_table() -> None:
    assert set(preset_names()) - set(PUBLISHED) == {"bench-4b", "tiny-deepseek-v3"}


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("deepseek-v3", 61 * (512 + 64) * 2),
        ("mixtral-8x7b", 32 * 8 * 2 * 128 * 2),
        ("gpt-oss-120b", 36 * 8 * 2 * 64 * 2),
        ("qwen3-235b-a22b", 94 * 4 * 2 * 128 * 2),
    ],
)
def test_cache(name: str, bytes_per_token: int) -> None:
    assert model_facts(name)["kv_bytes_per_token"] == bytes_per_token


def test_the_list_with_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    list_models(sizes=True, as_json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert set(rows) == set(preset_names())
    assert rows["deepseek-v3"]["parameters"] == 671026419200 and rows["deepseek-v3"]["layers"] == 61
    list_models(sizes=True)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("deepseek-v3 ")]
    assert line.split() == ["deepseek-v3", "deepseek_v3", "61", "671.03", "B", "37.55", "B", "70.3", "kB"]
