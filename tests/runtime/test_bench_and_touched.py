"""The measurements of `moec bench`: that they count what they say."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import toy_artifact

from moec.runtime.bench import bench, peak_memory
from moec.runtime.errors import NoRoom, PromptTooLong, WrongOption
from moec.runtime.touched import bytes_read

PAGE = mmap.PAGESIZE


def test_only_pages_that_were_read_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(64 * PAGE))
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert len(bytes(data)) == 64 * PAGE  # all pages are mapped

        def read() -> None:
            for page in (3, 4, 40):
                assert data[page * PAGE : (page + 1) * PAGE]

        counted = bytes_read(file, read)
    if counted is None:
        pytest.skip("this system does not tell which pages were read")
    assert counted == 3 * PAGE


def test_a_bench_reports_consistent_numbers(toy: Path) -> None:
    notes: list[str] = []
    result = bench(str(toy), prompt_tokens=20, new_tokens=5, repeat=3, batch=2, threads=2, progress=notes.append)
    assert len(notes) == 4
    assert result.prefill_tokens_per_s == sorted(result.prefill_runs)[1]
    assert result.decode_tokens_per_s == sorted(result.decode_runs)[1] > 0
    assert result.weight_bytes == 2 * toy_artifact.VOCAB * toy_artifact.WIDTH * 4
    if result.step_weight_bytes is not None and result.decode_bound_tokens_per_s is not None:
        head = result.weight_bytes // 2
        assert head <= result.step_weight_bytes <= result.weight_bytes + 2 * PAGE
        bound = 2 * result.read_bandwidth / result.step_weight_bytes
        assert result.decode_bound_tokens_per_s == pytest.approx(bound)
    assert 0 < result.peak_memory_bytes <= peak_memory()


def test_default_sizes_fit_the_artifact(toy: Path) -> None:
    result = bench(str(toy), repeat=1)
    assert (result.prompt_tokens, result.new_tokens) == (toy_artifact.CONTEXT // 2, 64)


@pytest.mark.parametrize(
    ("sizes", "kind", "names"),
    [
        ({"prompt_tokens": 0}, WrongOption, "prompt-tokens"),
        ({"new_tokens": 1}, WrongOption, "new-tokens"),
        ({"repeat": 0}, WrongOption, "repeat"),
        ({"batch": 4}, WrongOption, "1 to 3"),
        ({"prompt_tokens": 201, "new_tokens": 2}, PromptTooLong, "201"),
        ({"prompt_tokens": 150, "new_tokens": 60}, NoRoom, "51"),
    ],
)
def test_sizes_beyond_the_artifact(toy: Path, sizes: dict[str, int], kind: type[Exception], names: str) -> None:
    with pytest.raises(kind, match=names):
        bench(str(toy), **sizes)  # type: ignore[arg-type]
