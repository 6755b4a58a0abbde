# mypy: ignore-errors
"""The GPU kernel in Triton."""

import triton
import triton.language as tl


@triton.jit
def swiglu_limited(x_ptr, y_ptr, limit, INNER, BLOCK: tl.constexpr):
    """x[M, 2*INNER] (gate, then up) -> y[M, INNER]; BLOCK elements a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    gate = tl.load(x_ptr + row * 2 * INNER + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * INNER + INNER + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.maximum(tl.minimum(up, limit), -limit)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * INNER + column, y.to(y_ptr.dtype.element_ty), mask=inside)
