"""The place-experts pass: replicas follow the loads, shard follows the placement, wrong input is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moec
from moec.errors import InputError
from moec.ir import Module
from moec.passes.base import Context, Limits, Outcome
from moec.passes.numerics import Numerics
from moec.passes.pipeline import pipeline
from moec.passes.place_experts import PlaceExperts
from moec.passes.placement import Problem, place
from moec.passes.planning.layout import Layout
from moec.passes.shard import Shard
from moec.targets import load

SMALL = {"num_hidden_layers": "3", "first_k_dense_replace": "1"}
LAYOUT = Layout(1, 3, 3, 16, 18)


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    """Two layers of 16 experts, one of them with a third of all tokens."""
    array = np.full((2, 16), 100.0)
    array[0, 5] = array[1, 11] = 750.0
    np.save(tmp_path / "loads.npy", array)
    return tmp_path / "loads.npy"


def placed(loads: Path, **options: str | int) -> tuple[Module, Outcome]:
    module = moec.trace("tiny-deepseek-v3", SMALL).ir
    step = PlaceExperts(loads=str(loads), **options)  # type: ignore[arg-type]
    return module, step.run(module, Context(load("cpu"), Limits(), LAYOUT))


@pytest.mark.parametrize("slots", [6, 8])
def test_busy_experts_are_copied_and_results_stay(loads: Path, slots: int) -> None:
    """In float64 to 1e-9 over three ranks, with the layout's slots and with more."""
    module, out = placed(loads, slots=slots)
    before = Numerics(moec.trace("tiny-deepseek-v3", SMALL).ir, 1024)
    rows = module.attrs["placement"]
    assert isinstance(rows, tuple) and all(isinstance(row, tuple) and len(row) == 3 * slots for row in rows)
    copies = [row.count(busy) for row, busy in zip(rows, (5, 11), strict=True)]  # type: ignore[union-attr, arg-type]
    assert min(copies) >= 2
    assert all(set(row) == set(range(16)) for row in rows)  # type: ignore[arg-type]
    assert out.matched == 2
    Shard().run(module, Context(load("cpu"), Limits(), LAYOUT))
    assert {op.attrs["slots"] for _, op in module.ops() if op.name == "comm.dispatch"} == {3 * slots}
    assert before.check(module, 0.0) is None


def test_several_recordings_are_merged_as_moec_place_does(tmp_path: Path) -> None:
    """Two recordings with opposite favourites: alone, added, and with factors."""
    first, second = np.full((2, 16), 100.0), np.full((2, 16), 100.0)
    first[:, 5], second[:, 11] = 3000.0, 750.0
    for name, array in (("a", first), ("b", second)):
        np.savez(tmp_path / f"{name}.npz", loads=array, coactivation=np.ones((2, 16, 16)), layers=[1, 2])
    both = Path(f"{tmp_path}/a.npz:{tmp_path}/b.npz")
    added, out = placed(both)
    expected = place(Problem.of(first + second, devices=3, slots_per_device=6))
    assert added.attrs["placement"] == tuple(map(tuple, expected.placement.physical_to_logical_map.tolist()))
    assert out.notes[:2] == ["loads of a.npz, times 1", "loads of b.npz, times 1"]
    alone, _ = placed(both, weights="0:1")
    assert alone.attrs["placement"] == placed(tmp_path / "b.npz")[0].attrs["placement"] != added.attrs["placement"]
    with pytest.raises(InputError, match=r"^place-experts: weights must be tokens, .* with ':' between them"):
        placed(both, weights="1:2:3")
    with pytest.raises(InputError, match=r"cannot read .*c\.npz: No such file"):
        placed(Path(f"{both}:{tmp_path}/c.npz"))


def test_recorded_pairs_gather_partners_on_nodes(tmp_path: Path) -> None:
    """Where a target has several nodes the pass takes the recorded co-activation, unless told not to."""
    rng = np.random.default_rng(3)
    pairs = np.zeros((2, 16, 16))
    for layer in range(2):
        partner = rng.permutation(16).reshape(8, 2)
        pairs[layer, partner[:, 0], partner[:, 1]] = pairs[layer, partner[:, 1], partner[:, 0]] = 500.0
    np.savez(tmp_path / "r.npz", loads=np.full((2, 16), 1000.0), coactivation=pairs)
    layout = Layout(1, 16, 16, 16, 16)
    rows, notes = {}, {}
    for given in ("", "none"):
        module = moec.trace("tiny-deepseek-v3", SMALL).ir
        step = PlaceExperts(loads=str(tmp_path / "r.npz"), coactivation=given)
        notes[given] = step.run(module, Context(load("h800-ep32"), Limits(), layout)).notes
        rows[given] = np.array(module.attrs["placement"])
    apart = {}
    for given, placement in rows.items():
        node = placement.argsort(axis=1) // 8
        apart[given] = sum(pairs[i][node[i][:, None] != node[i][None, :]].sum() for i in range(2))
    assert any("recorded co-activation" in note for note in notes[""]) and notes["none"] != notes[""]
    assert apart[""] == 0 < apart["none"]


def test_it_runs_before_shard() -> None:
    names = [p.name for p in pipeline(load("h800"), given=["place-experts"], ranks=8)]
    assert names.index("place-experts") == names.index("shard") - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loads": ""}, "name a file of loads"),
        ({"shares": "odd"}, "shares must be one of even, free"),
        ({"slots": 5}, "16 experts"),
        ({"groups": 5}, "groups"),
    ],
)
def test_wrong_options(loads: Path, options: dict[str, str | int], message: str) -> None:
    module = moec.trace("tiny-deepseek-v3", SMALL).ir
    step = PlaceExperts(**{"loads": str(loads), **options})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        step.run(module, Context(load("cpu"), Limits(), LAYOUT))
    assert "placement" not in module.attrs


def test_loads_of_another_model(tmp_path: Path) -> None:
    np.save(tmp_path / "l.npy", np.ones((3, 16)))
    with pytest.raises(InputError, match=r"has loads of \[3, 16\], the model \[2, 16\]"):
        placed(tmp_path / "l.npy")


def test_one_rank_has_nothing_to_place(loads: Path) -> None:
    module = moec.trace("tiny-deepseek-v3", SMALL).ir
    out = PlaceExperts(loads=str(loads)).run(module, Context(load("cpu"), Limits()))
    assert out.warnings == ["experts lie on one rank: nothing to place"]
