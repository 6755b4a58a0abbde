"""Options of `moec compile` that are wrong, contradict each other, or name an output that cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import OPTIONS

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--target", "cpuu"], "did you mean cpu?"),
        (["--target", "h801"], "h800"),
        (["--target", "h800", "--recipe", "fp32"], "kernel 'cache_read' needs 'DV % 128 == 0'"),
        (["--recipe", "weights-only"], "did you mean weight-only"),
        (["--context", "65"], "exceeds the model's 64 positions; pass --context 64 or less"),
        (["--pass", "fuze"], "did you mean fuse"),
        (["--pass", "fuse{"], "want name or name{option=value,...}"),
        (["--pass", "fuse{x=1}"], "no option 'x'"),
        (["--pass", "mla-absorb{decode=maybe}"], "'maybe'"),
        (["--pass", "fp8-cast{scale=f33}"], "'f33'"),
        (["--verify", "structur"], "did you mean structure"),
        (["--no-weights", "--random-weights", "1"], "exclude each other"),
        (["--weights", "x", "--random-weights", "1"], "exclude each other"),
        (["--plan-only", "--random-weights", "1"], "packs no weights"),
        (["--phase", "decod"], "did you mean decode"),
        (["--phase", "decode"], "hold both phases"),
        (["--target", "h800", "--ep", "3", "--ranks", "8"], "8 ranks do not divide by EP 3"),
    ],
)
def test_wrong_options(refused: Refused, model_folder: Path, tmp_path: Path, options: list[str], names: str) -> None:
    line = refused("compile", model_folder, "--out", tmp_path / "x.moec", *options)
    assert names in line, line


def test_an_output_is_needed(refused: Refused, model_folder: Path) -> None:
    assert "--out FOLDER is missing" in refused("compile", model_folder)


@pytest.mark.parametrize(
    "arguments", [["--nope"], ["--batch", "0"], ["--context", "many"], ["--random-weights"], ["two", "models"]]
)
def test_usage_errors_exit_with_2(moec: Any, model_folder: Path, tmp_path: Path, arguments: list[str]) -> None:
    done = moec("compile", model_folder, "--out", tmp_path / "x", *arguments)
    assert done.code == 2 and "error: " in done.err and not done.out
    assert not list(tmp_path.iterdir())


def test_unknown_commands_exit_with_2(moec: Any) -> None:
    assert moec("compil").code == 2
    assert moec("models", "lst").code == 2
    assert moec().code == 2


def test_outputs_that_are_no_artifact_are_left_alone(refused: Refused, model_folder: Path, tmp_path: Path) -> None:
    def taken(out: Path) -> None:
        assert "exists and is not an artifact" in refused("compile", model_folder, *OPTIONS, "--out", out)

    file = tmp_path / "file"
    file.write_text("mine")
    taken(file)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    taken(folder)
    (folder / "manifest.json").write_text('{"name": "a web page"}')
    taken(folder)
    (folder / "manifest.json").write_text("{")
    taken(folder)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    taken(tmp_path / "link")


def test_outputs_below_a_file(refused: Refused, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused("compile", model_folder, *OPTIONS, "--out", tmp_path / "file" / "a" / "b.moec")
    assert "file is not a folder; choose another --out" in line


def test_a_file_in_the_place_of_the_dumps(refused: Refused, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = ("compile", model_folder, *OPTIONS, "--plan-only", "--dump-ir", tmp_path / "file")
    assert "file: " in refused(*command, code=1)


def test_a_model_larger_than_the_device_is_told(moec: Any) -> None:
    """Not refused: its program is worth a look; with --strict it is."""
    command = ("compile", "deepseek-v3", "--target", "h800", "--phase", "decode", "--plan-only")
    words = "warning: the model would hold 673 GB of weights (654 GB of experts) and 36.8 GB of cache"
    done = moec(*command)
    assert done.code == 0 and words in done.err and "use --ranks 32 or more" in done.err
    done = moec(*command, "--strict")
    assert done.code != 0 and "memory" in done.err and "673 GB" in done.err
