"""The cache of compiled kernels: checked, shared by processes, and not needed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folder_snapshot import snapshot
from small_checkpoint import OPTIONS

from moec.codegen.tvm.library_cache import cache_folder, find_or_build, is_sound


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def writer(content: str, calls: list[str]) -> Callable[[Path], None]:
    def build(work: Path) -> None:
        calls.append(content)
        (work / "kernels.so").write_text(content)
        (work / "program.json").write_text("{}")

    return build


def test_an_entry_is_built_once(cache: Path) -> None:
    calls: list[str] = []
    first = find_or_build("k", writer("a", calls))
    second = find_or_build("k", writer("b", calls))
    assert (first.cached, second.cached, calls) == (False, True, ["a"])
    assert first.folder == second.folder == cache / "cpu" / "k"
    assert find_or_build("other", writer("b", calls)).folder != first.folder


@pytest.mark.parametrize("name", ["kernels.so", "program.json", "SHA256SUMS"])
@pytest.mark.parametrize("content", [None, b"", b"spoiled"])
def test_a_damaged_entry_is_built_again(cache: Path, name: str, content: bytes | None) -> None:
    folder = find_or_build("k", writer("a", [])).folder
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    calls: list[str] = []
    again = find_or_build("k", writer("a", calls))
    assert calls == ["a"] and not again.cached and is_sound(again.folder)
    assert [p.name for p in (cache / "cpu").iterdir() if p.is_dir()] == ["k"]


def test_a_failed_build_leaves_nothing(cache: Path) -> None:
    def build(work: Path) -> None:
        (work / "kernels.so").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_or_build("k", build)
    assert not list((cache / "cpu").iterdir())


def test_the_first_of_two_builders_is_kept(cache: Path) -> None:
    together = threading.Barrier(2)

    def build(work: Path) -> None:
        together.wait(timeout=60)
        (work / "kernels.so").write_text(threading.current_thread().name)

    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append((find_or_build("k", build).folder / "kernels.so").read_text()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 2 and is_sound(cache / "cpu" / "k")
    assert (cache / "cpu" / "k" / "kernels.so").read_text() == found[0] == found[1]
    assert sorted(p.name for p in (cache / "cpu").iterdir()) == [".lock", "k"]


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path) -> None:
    cache.write_text("a file")
    entry = find_or_build("k", writer("a", []))
    assert is_sound(entry.folder) and cache not in entry.folder.parents
    assert f"the cache {cache / 'cpu'} cannot be written (Not a directory); set MOEC_CACHE_DIR" in entry.note


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEC_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/moec")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/a")
    assert cache_folder() == Path("/home/a/.cache/moec")


@pytest.mark.slow
def test_two_processes_compile_at_once(model_folder: Path, tmp_path: Path, artifact: Path) -> None:
    """With an empty cache, both artifacts are the one that was compiled alone."""
    command = [sys.executable, "-m", "moec", "compile", str(model_folder), *OPTIONS, "--out"]
    environment = {**os.environ, "MOEC_CACHE_DIR": str(tmp_path / "cache")}
    running = [subprocess.Popen([*command, str(tmp_path / n)], env=environment) for n in ("a", "b")]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b") == snapshot(artifact)


def test_compiling_again_imports_no_compiler(artifact: Path, model_folder: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from moec.cli import main
sys.argv = ["moec", "compile", {str(model_folder)!r}, *{OPTIONS!r}, "--out", {str(tmp_path / "x.moec")!r}]
try:
    main()
except SystemExit as ended:
    assert not ended.code
assert "torch" in sys.modules
assert "tvm" not in sys.modules and "triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "kernels from the cache" in done.stderr


def test_a_compiler_that_is_missing(
    moec: Any, monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    from importlib.metadata import PackageNotFoundError

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("moec.codegen.tvm.compile.version", version)
    done = moec("compile", model_folder, *OPTIONS, "--out", tmp_path / "x.moec")
    assert done.code == 1 and "pip install 'moec[cpu]'" in done.err
    assert not list(tmp_path.iterdir())
