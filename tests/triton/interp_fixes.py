"""Repairs of the Triton 3.6 interpreter, applied by the test worker before a kernel runs.

The interpreter multiplies the bit patterns of BF16 operands in `tl.dot`, drops the carry when it rounds to FP8, rounds
subnormals wrongly and truncates to BF16. A device rounds to nearest even (PTX ISA, `cvt`), saturating for FP8, and so
do these replacements, by torch's casts. `test_interp_fixes.py` holds them to torch, and shows that they are needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
INTEGER = {
    1: (torch.uint8, np.uint8),
    2: (torch.int16, np.int16),
    4: (torch.int32, np.int32),
    8: (torch.int64, np.int64),
}
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}


def to_torch(data: Any, dtype: Any) -> torch.Tensor:
    """The interpreter's array (numbers, or bit patterns of types that numpy lacks) as a torch tensor of its type."""
    kind = TORCH[dtype]
    bits = np.array(data, copy=True, order="C").view(INTEGER[kind.itemsize][1])
    return torch.from_numpy(bits).view(kind)


def bits_of(tensor: torch.Tensor) -> Any:
    """The bit patterns of a tensor as an unsigned numpy array."""
    width = tensor.element_size()
    return tensor.contiguous().view(INTEGER[width][0]).numpy().view(f"uint{8 * width}")


def convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """Replaces the interpreter's cast between floating-point types: the bit patterns of the result."""
    if source not in TORCH or target not in TORCH or rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
        return ORIGINAL_CONVERT(data, source, target, rounding_mode)
    shape = np.shape(data)
    value = to_torch(np.atleast_1d(data), source)
    if target in LARGEST:
        value = value.float().clamp(-LARGEST[target], LARGEST[target])
    return bits_of(value.to(TORCH[target])).reshape(shape)


def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Replaces the interpreter's product: floating-point operands are multiplied and added in float32 or wider."""
    if a.dtype.scalar in TORCH and b.dtype.scalar in TORCH:
        wide = torch.float64 if tl.float64 in (a.dtype.scalar, b.dtype.scalar) else torch.float32
        product = torch.matmul(to_torch(a.data, a.dtype.scalar).to(wide), to_torch(b.data, b.dtype.scalar).to(wide))
        result = product.numpy().astype(d.data.dtype) + d.data
    else:
        result = np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data
    return interpreter.TensorHandle(result, d.dtype.scalar)


ORIGINAL_CONVERT = interpreter._convert_float
ORIGINAL_DOT = interpreter.InterpreterBuilder.create_dot


def apply() -> None:
    """Puts the repairs in place."""
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def remove() -> None:
    """Takes them away again, for the test that shows why they are there."""
    interpreter._convert_float = ORIGINAL_CONVERT
    interpreter.InterpreterBuilder.create_dot = ORIGINAL_DOT
