"""A table of imports: transformers' classes as undeclared modules, beside the declared model of the same weights.

    python benchmarks/torch_import.py [--seed N] [--only FAMILY]

Columns: greatest difference of logits over their standard deviation (reference evaluator against the module), the share
of ops raised, and predicted microseconds on an h800 of the imported and the declared model, for prefill and decode.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "families"))

from imported import IMPORTED, difference, module_of

import moec
from moec import targets
from moec.frontend.torch_import import TorchSource
from moec.passes.planning import Options, make_plan


def row(family: str, seed: int) -> tuple[float, float, list[tuple[float, float]]]:
    """Error, share raised, and times (imported, declared) of both phases."""
    module = module_of(family, seed)
    traced = moec.trace(module)
    assert isinstance(traced.source, TorchSource)
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        declared = moec.trace(folder).ir
    options, target = Options(batch=8, context=64, prompt=64, chunk=64), targets.load("h800")
    plans = [make_plan(ir, target, options) for ir in (traced.ir, declared)]
    times = [(plans[0].phases[p].serial_us, plans[1].phases[p].serial_us) for p in plans[0].phases]
    return difference(traced, module, seed), traced.source.report.share, times


def main() -> None:
    """Print the table; exit code 1 when a row departs by more than 1e-4, or 10 % in a time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only", choices=sorted(IMPORTED))
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"seed {given.seed}\n{'class of':16} {'logits':>9} {'raised':>7} {'prefill us':>19} {'decode us':>19}")
    failed = False
    for family in [given.only] if given.only else IMPORTED:
        error, share, times = row(family, given.seed)
        failed |= error >= 1e-4 or any(abs(a / b - 1) > 0.1 for a, b in times)
        shown = " ".join(f"{a:7.1f} {b:7.1f} {a / b - 1:+4.0%}" for a, b in times)
        print(f"{family:16} {error:9.1e} {share:7.1%} {shown}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
