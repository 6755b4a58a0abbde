"""The source that `moec compile --source` adds: a C compiler builds from it what the artifact runs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoint import OPTIONS

import moec as package
from moec.codegen.artifact import write_manifest


@pytest.fixture(scope="module")
def with_source(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = package.trace(str(model_folder)).optimize("cpu", context=32, chunk=8, recipe="fp32")
    return plan.compile(tmp_path_factory.mktemp("source") / "x.moec", source=True).path


def test_the_library_built_from_it_computes_the_same(with_source: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(with_source, tmp_path / "own.moec"))
    source = own / "kernels" / "source"
    subprocess.run(["make", "-s"], cwd=source, check=True)
    (source / "kernels.so").replace(own / "kernels" / "kernels.so")
    facts = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").unlink()
    write_manifest(own, {k: v for k, v in facts.items() if k not in ("format_version", "files", "checksum")})
    ids = [[3, 14, 15, 9, 2, 6, 5]]
    np.testing.assert_array_equal(package.load(own).logits(ids), package.load(with_source).logits(ids))


def test_every_kernel_has_its_text(with_source: Path) -> None:
    kernels = json.loads((with_source / "kernels" / "kernels.json").read_text())
    texts = {file.stem: file.read_text() for file in (with_source / "kernels/source/functions").iterdir()}
    assert {k["symbol"] for k in kernels} <= set(texts)
    assert all(f"def {name}(" in text for name, text in texts.items())


def test_without_the_option_there_is_none(artifact: Path) -> None:
    assert {file.name for file in (artifact / "kernels").iterdir()} == {"kernels.so", "kernels.json"}


def test_a_plan_has_no_kernels(refused: Any, model_folder: Path) -> None:
    assert "leave --source away" in refused("compile", model_folder, *OPTIONS, "--plan-only", "--source")
