"""Runs in a process that sees the installed example package; prints what it found as JSON.

Usage: python check_plugin.py MODEL_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import moec


def logits(folder: Path, out: Path) -> float:
    """Greatest difference from the expected logits, in their standard deviations."""
    plan = moec.trace(str(folder)).optimize("quiet-cpu", context=64, chunk=16, recipe="fp32", verify="numerics")
    ops = [op.name for _, op in plan.ir.ops()]
    assert "swiglu.limited" in ops and "swiglu" not in ops
    model = moec.load(plan.compile(out / "limited.moec").path)
    found = [model.logits(np.load(folder / "ids.npy"), chunk=chunk) for chunk in (None, 1)]
    expected = np.load(folder / "logits.npy")
    return max(float(np.abs(f - expected).max() / expected.std()) for f in found)


if __name__ == "__main__":
    print(json.dumps({"error": logits(Path(sys.argv[1]), Path(sys.argv[2]))}))
