"""A hand-made artifact: a toy model as one TVM function, with what the compiler would write around it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import toy_artifact


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the toy model; do not change it."""
    folder = tmp_path_factory.mktemp("toy") / "toy.moec"
    toy_artifact.write(folder)
    return folder


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of the toy artifact to spoil."""

    def make() -> Path:
        target = tmp_path / "copy.moec"
        shutil.copytree(toy, target)
        return target

    return make
