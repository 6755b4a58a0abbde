"""An artifact appears whole or not at all, is replaced in one step, and equal input gives equal bytes."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folder_snapshot import snapshot
from small_checkpoint import OPTIONS, tensors

from moec.codegen import artifact as writing
from moec.codegen.artifact import WriteFailed, artifact_folder
from moec.runtime.manifest import checksum

Refused = Callable[..., str]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes one writing step fail as on a full disk."""

    def fill(step: str) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(step, fail)

    return fill


@pytest.mark.parametrize(
    "step",
    ["tempfile.mkdtemp", "shutil.copyfile", "moec.codegen.pack.pack_weights", "moec.codegen.artifact.write_json"],
)
def test_a_full_disk_leaves_nothing(
    artifact: Path, moec: Any, full_disk: Any, model_folder: Path, tmp_path: Path, step: str
) -> None:
    full_disk(step)
    done = moec("compile", model_folder, *OPTIONS, "--out", tmp_path / "new" / "x.moec")
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert "x.moec: could not be written: No space left on device; nothing was left behind" in last
    assert not list(tmp_path.iterdir())


def test_a_file_that_may_not_grow_leaves_nothing(artifact: Path, model_folder: Path, tmp_path: Path) -> None:
    """The system's own refusal, half way through the weights."""
    library = (artifact / "kernels" / "kernels.so").stat().st_size
    weights = (artifact / "weights" / "rank-00000.safetensors").stat().st_size
    limit = max(library, weights) - 1
    done = subprocess.run(
        [sys.executable, "-m", "moec", "compile", model_folder, *OPTIONS, "--out", tmp_path / "x.moec"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "could not be written: File too large" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(
    artifact: Path, moec: Any, monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moec.codegen.pack.pack_weights", interrupt)
    done = moec("compile", model_folder, *OPTIONS, "--out", tmp_path / "new" / "x.moec")
    assert done.code == 130 and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(model_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A signal while the kernels are compiled: neither output nor cache keep a part."""
    cache = tmp_path / "cache"
    out = str(tmp_path / "x.moec")
    command = [sys.executable, "-m", "moec", "compile", str(model_folder), *OPTIONS, "--out", out]
    process = subprocess.Popen(
        command, env={**os.environ, "MOEC_CACHE_DIR": str(cache)}, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(cache.glob("cpu/.build-*")):
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert not [p for p in tmp_path.rglob("*") if p != cache and p != cache / "cpu"]


def test_an_interrupt_within_executed_text_ends_with_130(tmp_path: Path) -> None:
    """CPython remembers a KeyboardInterrupt that passes through exec(), and dies by it although it was caught."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "import moec.cli\n"
        "def interrupted(arguments):\n"
        "    exec('os.kill(os.getpid(), signal.SIGINT)\\nfor _ in range(10**9): pass')\n"
        "moec.cli.make_app = interrupted\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "moec", "doctor"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 130 and done.stderr == ""


def test_replacing_keeps_the_old_artifact_until_the_end(tmp_path: Path) -> None:
    out = tmp_path / "x.moec"
    for value in ("1", "2"):
        with artifact_folder(out) as work:
            (work / "manifest.json").write_text(f'{{"format_version": {value}}}')
    assert snapshot(tmp_path) == {"x.moec": None, "x.moec/manifest.json": b'{"format_version": 2}'}
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError), artifact_folder(out) as work:
        (work / "manifest.json").write_text("half")
        assert {name: data for name, data in snapshot(tmp_path).items() if name.startswith("x.")} == before
        raise ZeroDivisionError
    assert snapshot(tmp_path) == before


def test_replacing_never_shows_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot swap folders, a failed second step brings the old artifact back."""
    out = tmp_path / "x.moec"
    with artifact_folder(out) as work:
        (work / "manifest.json").write_text('{"format_version": 1}')
    before = snapshot(tmp_path)
    monkeypatch.setattr(writing, "_swap", lambda a, b: False)
    rename = Path.rename

    def fail_for_new(self: Path, target: Path) -> Path:
        if target == out and self.name != "artifact":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with pytest.raises(WriteFailed), artifact_folder(out) as work, monkeypatch.context() as patch:
        (work / "manifest.json").write_text("new")
        patch.setattr(Path, "rename", fail_for_new)
        writing._replace(work, out)
    assert snapshot(tmp_path) == before
    with artifact_folder(out) as work:
        (work / "manifest.json").write_text('{"format_version": 2}')
    assert (out / "manifest.json").read_text() == '{"format_version": 2}' and len(list(tmp_path.iterdir())) == 1


def test_an_artifact_is_replaced_by_compile(artifact: Path, moec: Any, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "x.moec"
    assert moec("compile", model_folder, *OPTIONS, "--no-weights", "--out", out).code == 0
    assert not (out / "weights").exists()
    done = moec("compile", model_folder, *OPTIONS, "--out", out)
    assert done.code == 0 and "kernels from the cache" in done.err and not done.out
    assert snapshot(out) == snapshot(artifact)
    assert list(out.parent.iterdir()) == [out]


def test_the_manifest_carries_its_checksum(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["checksum"] == checksum(manifest)
    assert set(manifest["files"]) == {n for n, d in snapshot(artifact).items() if d and n != "manifest.json"}


@pytest.fixture
def fresh_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MOEC_CACHE_DIR", str(folder))
    yield folder


def test_weights_keep_their_values(artifact: Path) -> None:
    from safetensors.numpy import load_file

    stored = load_file(artifact / "weights" / "rank-00000.safetensors")
    assert (stored["embed"] == tensors()["model.embed_tokens.weight"].float().numpy()).all()


def test_equal_input_gives_equal_bytes(
    artifact: Path, fresh_cache: Path, moec: Any, model_folder: Path, tmp_path: Path
) -> None:
    done = moec("compile", model_folder, *OPTIONS, "--out", tmp_path / "other name.moec")
    assert done.code == 0 and "kernels compiled" in done.err
    assert snapshot(tmp_path / "other name.moec") == snapshot(artifact)
