"""A table of families: logits of compiled artifacts against transformers on configurations drawn anew.

    python benchmarks/families.py [--seed N] [--number N] [--only FAMILY]

Columns: greatest difference over the logits' standard deviation for whole prefill, chunks of 7, and decoding token by
token (FP32), and the median over tokens of the relative error with FP8 weights (of a family's first configuration).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "families"))

from random_configs import FAMILIES, save_model

import moec

LENGTH = 50


def row(family: str, seed: int, recipes: tuple[str, ...]) -> list[float]:
    """The errors of one configuration: three of FP32, one of FP8 weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        oracle = save_model(family, seed, folder / "hf")
        ids = np.random.default_rng(seed).integers(0, oracle.config.vocab_size, (2, LENGTH))
        with torch.no_grad():
            expected = oracle(torch.tensor(ids)).logits.numpy()
        errors = []
        for recipe in recipes:
            plan = moec.trace(str(folder / "hf")).optimize("cpu", batch=2, context=64, chunk=32, recipe=recipe)
            model = moec.load(plan.compile(folder / f"{recipe}.moec").path)
            if recipe == "fp32":
                for chunk in (None, 7, 1):
                    errors.append(float(np.abs(model.logits(ids, chunk=chunk) - expected).max() / expected.std()))
            else:
                moved = np.sqrt(((model.logits(ids) - expected) ** 2).mean(-1)) / expected.std()
                errors.append(float(np.median(moved)))
        return errors


def main() -> None:
    """Print the table; exit code 1 when an FP32 error exceeds 1e-4."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--number", type=int, default=2, help="configurations a family")
    parser.add_argument("--only", choices=sorted(FAMILIES))
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(f"seed {given.seed}\n{'family':16} {'no':>2} {'prefill':>9} {'chunks':>9} {'decode':>9} {'FP8':>7}")
    failed = False
    for family in [given.only] if given.only else FAMILIES:
        for number in range(given.number):
            errors = row(family, given.seed + number, ("fp32",) if number else ("fp32", "weight-only"))
            failed |= max(errors[:3]) >= 1e-4
            shown = " ".join([*(f"{e:9.1e}" for e in errors[:3]), *(f"{e:7.3f}" for e in errors[3:])])
            print(f"{family:16} {number:2} {shown}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
