"""The embedded model with its multi-token-prediction module, compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest
from mtp_oracle import FOLDER

import moec
from moec.runtime import Model


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mtp") / "tiny.moec"
    plan = moec.trace("tiny-deepseek-v3", mtp=True).optimize("cpu", batch=3, context=512, drafts=3, recipe="fp32")
    return plan.compile(out).path


@pytest.fixture(scope="session")
def model(artifact: Path) -> Model:
    return moec.load(artifact)


@pytest.fixture(scope="session")
def heldout(model: Model) -> list[int]:
    return model.tokenizer.encode((FOLDER / "heldout.txt").read_text(encoding="utf-8"))
