"""Output files: with the user's rights, never over what is no regular file, refused before the work if need be."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moec.files import NotWritten, write_whole

Refused = Callable[..., str]


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_whole(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def test_a_pipe_stays_one(tmp_path: Path) -> None:
    """Also /dev/stdout and /dev/null, which moving a file to their place would destroy."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, "through")
    reader.join(30)
    assert got == [b"through"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == "text"
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(NotWritten, match="Too many levels"):
        write_whole(tmp_path / "circle", "text")


@pytest.mark.parametrize("option", ["--out", "--sglang", "--merged", "--report"])
def test_nothing_is_placed_where_one_of_the_files_cannot_be_written(
    refused: Refused, tmp_path: Path, option: str
) -> None:
    np.save(tmp_path / "loads.npy", np.ones((2, 8)))
    (tmp_path / "folder").mkdir()
    others = [o for o in ("--out", "--sglang") if o != option]
    more = [word for o in others for word in (o, tmp_path / f"{o.strip('-')}.json")]
    for file, why in ((tmp_path / "folder", "is a folder"), (tmp_path / "no" / "x.npz", "is no folder that can be")):
        line = refused("place", tmp_path / "loads.npy", "--devices", "2", *more, option, file)
        assert line.startswith(f"{option} {file}: ") and why in line


@pytest.mark.parametrize("option", ["--trace", "--calibration-rows"])
def test_nothing_is_measured_for_a_file_that_cannot_be_written(refused: Refused, tmp_path: Path, option: str) -> None:
    more = ["--profile"] if option == "--trace" else []
    assert "is a folder" in refused("bench", "any", *more, option, tmp_path)
