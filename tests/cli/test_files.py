"""Files of results are written whole or not at all, whatever ends the writing."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import pytest

from moec.files import NotWritten, write_whole


def test_text_and_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_whole(file, "Grüße\n")
    assert file.read_bytes() == "Grüße\n".encode()
    write_whole(file, lambda out: out.write(b"\x00\xff"))
    assert file.read_bytes() == b"\x00\xff"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("no number"), KeyboardInterrupt()]
)
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "a"
    file.write_text("before")

    def fail(out: IO[bytes]) -> None:
        out.write(b"half")
        raise error

    with pytest.raises(NotWritten if isinstance(error, OSError) else type(error)) as caught:
        write_whole(file, fail)
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {file}: No space left on device"
    assert (file.read_text(), [p.name for p in tmp_path.iterdir()]) == ("before", ["a"])


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "no" / "a", tmp_path / "folder"):
        with pytest.raises(NotWritten, match=f"cannot write {place}: "):
            write_whole(place, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
