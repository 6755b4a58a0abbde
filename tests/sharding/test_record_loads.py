"""Recorded loads: the experts that transformers' routers choose, in one process and over several; files and merging."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_models import CASES, compiled
from small_models import make_model

import moec
from moec.passes.placement.recordings import Recording, merge, read_recording
from moec.runtime.loads import LoadRecorder, Loads


def chosen_by_transformers(folder: Path, ids: np.ndarray) -> list[np.ndarray]:
    """Pairs of experts by layer that the reference's routers chose for `ids` [B, T]: [experts, experts] each."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    found: list[np.ndarray] = []

    def keep(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        chosen = np.zeros((given[1].shape[0], model.config.n_routed_experts))
        np.put_along_axis(chosen, given[1].numpy(), 1, axis=1)
        found.append(chosen.T @ chosen)

    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.from_numpy(ids))
    return found


def test_counts_are_those_of_transformers(tmp_path: Path) -> None:
    make_model("many-groups").save_pretrained(tmp_path / "hf")
    model = moec.load(compiled(tmp_path / "hf", tmp_path / "m.moec", "fp32"), threads=1)
    ids = np.random.default_rng(0).integers(0, model.vocab, (3, 20))
    model.record_loads()
    model.logits(ids)
    prefilled = model.recorded_loads()
    model.record_loads()
    model.logits(ids, chunk=1)
    expected = chosen_by_transformers(tmp_path / "hf", ids)
    for found in (prefilled, model.recorded_loads()):
        assert np.array_equal(found.coactivation, expected)
        assert np.array_equal(found.loads, [np.diagonal(pairs) for pairs in expected])


@pytest.mark.parametrize("mesh", ["dp2-tp2-ep4-forwarded", pytest.param("pp2-tp2", marks=pytest.mark.slow)])
def test_ranks_record_what_one_process_does(mesh: str, tmp_path: Path) -> None:
    """`moec run --record-loads` under torchrun: every token counts once, whatever the mesh."""
    make_model("many-groups").save_pretrained(tmp_path / "hf")
    run = [sys.executable, "-m", "moec", "run"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        "-m",
        "moec",
        "run",
    ]
    files: list[Path] = []
    for command, case in ((run, None), (torchrun, CASES[mesh])):
        artifact = compiled(tmp_path / "hf", tmp_path / f"{len(files)}.moec", "fp32", case)
        files.append(tmp_path / f"{len(files)}.npz")
        options = ["--prompt-ids", "5,6,7,8,9,10,11", "--max-new-tokens", "6", "--threads", "1", "--record-loads"]
        done = subprocess.run([*command, str(artifact), *options, str(files[-1])], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr.count("moec: wrote") == 1, done.stderr
    one, many = (np.load(file) for file in files)
    for name in ("layers", "loads", "coactivation"):
        assert np.array_equal(one[name], many[name])


def test_a_recorder_counts_in_pieces_and_keeps_no_array() -> None:
    draw = np.random.default_rng(1)
    recorder, expected = LoadRecorder([3, 4], 8), np.zeros((2, 8), dtype=np.int64)
    buffer = np.empty((2, 40, 3), dtype=np.int32)
    for _ in range(30):
        buffer[...] = np.argsort(draw.random((2, 40, 8)), axis=2)[:, :, :3]
        recorder.add(buffer)
        for layer in range(2):
            expected[layer] += np.bincount(buffer[layer].ravel(), minlength=8)
    assert np.array_equal(recorder.loads().loads, expected)
    assert np.array_equal(recorder.loads().coactivation.sum(axis=2), expected * 3)


def test_stages_of_a_pipeline_join_by_layer() -> None:
    early = Loads(np.array([1]), np.array([[1, 2]]), np.ones((1, 2, 2), np.int64))
    late = Loads(np.array([2]), np.array([[5, 6]]), np.ones((1, 2, 2), np.int64))
    joined = Loads.joined([late, early, early])
    assert joined.layers.tolist() == [1, 2] and joined.loads.tolist() == [[2, 4], [5, 6]]


def recording(name: str, *rows: list[float], pairs: bool = True) -> Recording:
    loads = np.array(rows, dtype=np.float64)
    return Recording(name, loads, np.stack([np.diag(row) for row in loads]) if pairs else None, (3,))


def test_recordings_are_added_with_weights(tmp_path: Path) -> None:
    a, b = recording("a", [1, 2, 3]), recording("b", [10, 0, 2])
    merged, factors = merge([a, b])
    assert merged.loads.tolist() == [[11, 2, 5]] and factors == [1, 1]
    assert merged.coactivation is not None and merged.coactivation[0].diagonal().tolist() == [11, 2, 5]
    assert merge([a, b], "3,1")[0].loads.tolist() == [[13, 6, 11]]
    equal, factors = merge([a, b], "equal")
    assert factors[0] * 6 == pytest.approx(factors[1] * 12) and equal.loads.sum() == pytest.approx(18)
    assert merge([a, recording("c", [1, 1, 1], pairs=False)])[0].coactivation is None
    merged.save(tmp_path / "all.npz")
    again = read_recording(tmp_path / "all.npz")
    assert again.loads.tolist() == merged.loads.tolist() and again.layers == (3,)


@pytest.mark.parametrize(
    ("other", "weights", "words"),
    [
        (recording("b", [1, 2]), "tokens", r"a and b are not of the same model: loads of \[1, 3\] and \[1, 2\]"),
        (Recording("b", np.ones((1, 3)), None, (7,)), "tokens", "different layers"),
        (recording("b", [1, 1, 1]), "1", "--weights must be tokens, equal, or 2 number"),
        (recording("b", [1, 1, 1]), "1,-1", "got 1,-1"),
        (recording("b", [1, 1, 1]), "1,two", "got 1,two"),
    ],
)
def test_recordings_that_do_not_fit(other: Recording, weights: str, words: str) -> None:
    with pytest.raises(moec.errors.InputError, match=words):
        merge([recording("a", [1, 2, 3]), other], weights)


@pytest.mark.slow
def test_the_commands_place_and_export(tmp_path: Path) -> None:
    """Two recordings are placed as one; an artifact's placement comes out in both forms and goes in again."""
    from moec.passes.placement import formats

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, "-m", "moec", *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        loads = draw.integers(1, 90, (2, 16))
        pairs = draw.integers(0, 9, (2, 16, 16))
        np.savez(tmp_path / f"{name}.npz", layers=[1, 2], loads=loads, coactivation=pairs + pairs.transpose(0, 2, 1))
    shape = ("--devices", 4, "--devices-per-node", 2, "--slots-per-device", 5)
    file, both = tmp_path / "p.json", tmp_path / "both.npz"
    done = run("place", tmp_path / "a.npz", tmp_path / "b.npz", *shape, "--out", file, "--merged", both)
    assert "b.npz: " in done.stderr and "times 1" in done.stderr and "gathers partners" in done.stderr
    assert np.array_equal(np.load(both)["loads"], sum(np.load(tmp_path / f"{n}.npz")["loads"] for n in "ab"))
    make_model("many-groups").save_pretrained(tmp_path / "hf")
    wanted = formats.read_placement(file)
    options = ("--target", "cpu", "--recipe", "fp32", "--ranks", 4, "--no-weights", "--context", 64)
    out = tmp_path / "m.moec"
    run("compile", tmp_path / "hf", *options, "--pass", f"shard{{placement={file}}}", "--out", out)
    run("export", out, "placement", "--out", tmp_path / "again.npz")
    assert np.array_equal(
        formats.read_placement(tmp_path / "again.npz").physical_to_logical_map, wanted.physical_to_logical_map
    )
    run("export", out, "placement", "--sglang", "--out", tmp_path / "sglang.json")
    rows = json.loads((tmp_path / "sglang.json").read_text())["physical_to_logical_map"]
    assert rows[-2:] == wanted.physical_to_logical_map.tolist()
