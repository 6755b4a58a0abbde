"""Runs kernels in Triton's interpreter, one request a line.

Triton reads TRITON_INTERPRET when a kernel is defined, so the interpreter needs a process of its own. A request is a
JSON object {"call": name, ...arguments}; the reply is {"value": ...} or {"error": traceback}, one line each.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import interp_fixes
import interp_kernels
import torch
from generated import generated_error, masked_error
from whole_models import drafts_found, draws_found, prompts_error

from moec.codegen.triton.problem import check, make
from moec.codegen.triton.spec import kernel
from moec.codegen.triton.specs.routing import router


def run_case(spec: str, case: str, arch: str, shape: str, seed: int = 0) -> dict[str, float]:
    """The worst errors of one case of one kernel, as shares of their bounds."""
    chosen = kernel(spec)
    found = next(c for c in chosen.cases if c.name == case)
    return check(make(chosen, found, arch, shape, seed))


def router_error(flags: list[bool]) -> dict[str, dict[str, float]]:
    """The same of every case of the router that gates of these attributes get."""
    spec = router(*flags)
    return {case.name: check(make(spec, case, "sm_90a")) for case in spec.cases}


def cast_bits(bits: list[int], source: str, target: str) -> list[int]:
    """The bit patterns that the interpreter's cast gives for `bits`; NaN gives -1."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    kind = getattr(torch, source)
    x = torch.tensor(bits, dtype=torch.int64).to(integer[kind.itemsize]).view(kind)
    y = torch.zeros(len(bits), dtype=getattr(torch, target))
    interp_kernels.cast[(1,)](x, y, len(bits))
    out = y.view(integer[y.element_size()]).to(torch.int64)
    return [-1 if nan else b for b, nan in zip(out.tolist(), y.float().isnan().tolist(), strict=True)]


def product_error(kind: str, n: int = 32) -> float:
    """Largest error of a product of random matrices against float64."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, n, generator=generator).to(getattr(torch, kind)) for _ in range(2))
    c = torch.zeros(n, n)
    interp_kernels.product[(1,)](a, b, c, n)
    return float((c - a.double() @ b.double()).abs().max())


def repairs(on: bool) -> None:
    (interp_fixes.apply if on else interp_fixes.remove)()


CALLS = {
    f.__name__: f
    for f in (
        run_case,
        router_error,
        cast_bits,
        product_error,
        repairs,
        prompts_error,
        drafts_found,
        draws_found,
        generated_error,
        masked_error,
    )
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": CALLS[request.pop("call")](**request)}
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    interp_fixes.apply()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a kernel prints must not be taken for a reply
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()
