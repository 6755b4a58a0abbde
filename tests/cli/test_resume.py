"""An interrupted packing goes on where it was, gives the bytes of an uninterrupted one, and takes nothing else's."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folder_snapshot import snapshot
from small_checkpoint import OPTIONS

from moec.codegen.pack import packed_bytes
from moec.ir import parse_module
from moec.ir.evaluate import WeightPrograms


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Sets how many points of weights are packed before an interruption; returns the list of those that were."""
    monkeypatch.setattr("moec.codegen.resume.EVERY", 1)
    value = WeightPrograms.value

    def until(most: int) -> list[str]:
        made: list[str] = []

        def counted(self: WeightPrograms, name: str, point: Any) -> Any:
            if len(made) == most:
                raise KeyboardInterrupt
            made.append(name)
            return value(self, name, point)

        monkeypatch.setattr(WeightPrograms, "value", counted)
        return made

    return until


def test_the_same_command_goes_on_and_gives_the_same_bytes(
    moec: Any, points: Callable[[int], list[str]], artifact: Path, model_folder: Path, tmp_path: Path
) -> None:
    out, command = tmp_path / "x.moec", ("compile", model_folder, *OPTIONS, "--out", tmp_path / "x.moec")
    whole = points(1000)
    assert moec(*command[:-1], tmp_path / "whole.moec").code == 0
    for most in (5, 6):
        points(most)
        done = moec(*command)
        assert done.code == 130 and "what is packed stays in" in done.err
        assert not out.exists() and (tmp_path / ".x.moec.packing" / "state.json").exists()
        # Nothing but the state stays: no half of an artifact.
        assert {p.name for p in tmp_path.iterdir()} == {"whole.moec", ".x.moec.packing"}
    rest = points(1000)
    done = moec(*command)
    assert done.code == 0 and "packing goes on where it was interrupted" in done.err
    assert 0 < len(rest) < len(whole) - 5
    assert snapshot(out) == snapshot(tmp_path / "whole.moec")
    assert {p.name for p in tmp_path.iterdir()} == {"whole.moec", "x.moec"}


@pytest.mark.parametrize("change", ["recipe", "weights", "damage", "file"])
def test_what_another_run_left_is_not_taken(
    moec: Any, points: Callable[[int], list[str]], artifact: Path, model_folder: Path, tmp_path: Path, change: str
) -> None:
    out, state = tmp_path / "x.moec", tmp_path / ".x.moec.packing"
    command = ["compile", str(model_folder), *OPTIONS, "--out", str(out)]
    points(6)
    other = ["compile", str(model_folder), "--recipe", "bf16", *OPTIONS[2:], "--out", str(out)]
    assert moec(*(other if change == "recipe" else command)).code == 130
    if change == "weights":
        file = model_folder / "model.safetensors"
        before = file.stat()
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    elif change == "damage":
        (state / "state.json").write_text('{"key": 3')
    elif change == "file":
        (state / "rank-00000.safetensors").write_bytes(b"short")
    made = points(1000)
    done = moec(*command)
    said = {"recipe": "other options or weights", "weights": "other options or weights", "damage": "cannot be read"}
    assert done.code == 0 and said.get(change, "") in done.err
    weights = [json.loads((p / "manifest.json").read_text())["files"] for p in (out, artifact)]
    assert weights[0]["weights/rank-00000.safetensors"] == weights[1]["weights/rank-00000.safetensors"]
    assert len(made) > 10 and not state.exists()


def test_a_run_beside_another_packs_by_itself(
    moec: Any, points: Callable[[int], list[str]], artifact: Path, model_folder: Path, tmp_path: Path
) -> None:
    state = tmp_path / ".x.moec.packing"
    state.mkdir()
    with (state / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert moec("compile", model_folder, *OPTIONS, "--out", tmp_path / "x.moec").code == 0
        assert [p.name for p in state.iterdir()] == ["lock"]


def test_the_end_of_the_process_leaves_what_is_packed(artifact: Path, model_folder: Path, tmp_path: Path) -> None:
    """No handler runs: as after a power cut."""
    script = (
        "import os, sys\n"
        "import moec.codegen.resume as resume\n"
        "from moec.cli import main\n"
        "resume.EVERY, note = 1, resume.Partial.note\n"
        "def last(self, name, points):\n"
        "    note(self, name, points)\n"
        "    points == 8 and os._exit(9)\n"
        "resume.Partial.note = last\n"
        "main()\n"
    )
    command = ["compile", str(model_folder), *OPTIONS, "--out", str(tmp_path / "x.moec")]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 9 and not (tmp_path / "x.moec").exists()
    again = subprocess.run([sys.executable, "-m", "moec", *command], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "packing goes on" in again.stderr, again.stderr
    assert snapshot(tmp_path / "x.moec") == snapshot(artifact)


def test_a_disk_that_is_too_small_is_told_before_packing(
    moec: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr("moec.codegen.pack.pack_weights", lambda *a, **k: pytest.fail("packed all the same"))
    done = moec("compile", model_folder, *OPTIONS, "--out", tmp_path / "x.moec")
    assert done.code == 1 and re.search(r"the weights take .* and the disk has 1 kB free: choose", done.err)
    assert not any(tmp_path.iterdir())


def test_packed_bytes_is_the_size_of_the_file(artifact: Path) -> None:
    module = parse_module((artifact / "program.ir").read_text())
    assert packed_bytes(module) == (artifact / "weights" / "rank-00000.safetensors").stat().st_size
