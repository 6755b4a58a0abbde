"""The parameter block of a launch, as Triton's kernels lay it out.

Run-time arguments in order; a tensor descriptor is a 128-byte map, then the sizes as i32 and the strides as i64; at the
end two pointers, global scratch and profile scratch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moec.runtime.cuda.errors import BadArguments

SCALARS: dict[str, Any] = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u8": ctypes.c_uint8,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}
RANGES = {
    "i1": (0, 1), "i8": (-(2**7), 2**7 - 1), "i16": (-(2**15), 2**15 - 1), "i32": (-(2**31), 2**31 - 1),
    "i64": (-(2**63), 2**63 - 1), "u8": (0, 2**8 - 1), "u32": (0, 2**32 - 1), "u64": (0, 2**64 - 1),
}  # fmt: skip
MAP_BYTES = 128
MAP_ALIGNMENT = 128
"""As CUDA 13's cuda.h declares CUtensorMap; CUDA 12 asked for 64."""


@dataclass(frozen=True)
class Matrix:
    """What a tensor descriptor is made of: device address, sizes and strides in elements, the last stride 1."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class AlignedBytes:
    """Host memory aligned as the driver wants tensor maps."""

    def __init__(self, size: int = MAP_BYTES) -> None:
        self.backing = ctypes.create_string_buffer(size + MAP_ALIGNMENT)
        start = ctypes.addressof(self.backing)
        self.address = start + -start % MAP_ALIGNMENT
        self.size = size


class Parameters:
    """The `kernelParams` array, and everything that must stay alive until the launch call returns."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.addresses: list[int] = []

    def scalar(self, value: Any) -> None:
        self.kept.append(value)
        self.addresses.append(ctypes.addressof(value))

    def bytes(self, value: AlignedBytes) -> None:
        self.kept.append(value)
        self.addresses.append(value.address)

    def array(self) -> Any:
        return (ctypes.c_void_p * len(self.addresses))(*self.addresses)


Encoder = Callable[[Mapping[str, Any], Matrix], AlignedBytes]


def pointer(name: str, argument: str, value: Any, aligned: bool) -> ctypes.c_uint64:
    """A device address, or what has `data_ptr()`; 16-byte aligned where the kernel was compiled for it."""
    address = value.data_ptr() if hasattr(value, "data_ptr") else value
    if not isinstance(address, int) or isinstance(address, bool) or address < 0:
        raise BadArguments(name=name, reason=f"'{argument}' must be a device address, not {type(value).__name__}")
    if aligned and address % 16:
        raise BadArguments(
            name=name, reason=f"'{argument}' must lie at a multiple of 16 bytes, it lies at {address:#x}"
        )
    return ctypes.c_uint64(address)


def number(name: str, argument: str, kind: str, value: Any, aligned: bool) -> Any:
    """A scalar of type `kind`, in its range and a multiple of 16 where the kernel was compiled for that."""
    if kind not in SCALARS:
        raise BadArguments(name=name, reason=f"'{argument}' has type '{kind}', which this loader does not know")
    if kind in RANGES:
        low, high = RANGES[kind]
        if not isinstance(value, int):
            raise BadArguments(name=name, reason=f"'{argument}' must be an integer, not {type(value).__name__}")
        if not low <= value <= high:
            raise BadArguments(name=name, reason=f"'{argument}' = {value} does not fit {kind}")
        if aligned and value % 16:
            raise BadArguments(name=name, reason=f"'{argument}' = {value} must be a multiple of 16")
    elif not isinstance(value, (int, float)):
        raise BadArguments(name=name, reason=f"'{argument}' must be a number, not {type(value).__name__}")
    return SCALARS[kind](value)


def pack(
    name: str,
    parameters: Sequence[Sequence[Any]],
    tensor_maps: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    encode: Encoder,
    scratch: int = 0,
) -> Parameters:
    """The launch's parameters from `arguments` by name. `parameters`: (name, type, aligned) in order.

    Raises BadArguments for a missing, unknown, misaligned or ill-typed argument.
    """
    wanted = [str(p[0]) for p in parameters]
    missing = [n for n in wanted if n not in arguments]
    unknown = [n for n in arguments if n not in wanted]
    if missing or unknown:
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise BadArguments(name=name, reason="arguments " + "; ".join(parts))
    packed = Parameters()
    maps = iter(tensor_maps)
    for argument, kind, aligned in parameters:
        value = arguments[argument]
        if kind.startswith("tensordesc"):
            matrix(name, argument, value)
            packed.bytes(encode(next(maps), value))
            for size in value.shape:
                packed.scalar(ctypes.c_int32(size))
            for stride in value.strides:
                packed.scalar(ctypes.c_int64(stride))
        elif kind.startswith("*"):
            packed.scalar(pointer(name, argument, value, aligned))
        else:
            packed.scalar(number(name, argument, kind, value, aligned))
    packed.scalar(ctypes.c_uint64(scratch))
    packed.scalar(ctypes.c_uint64(0))
    return packed


def matrix(name: str, argument: str, value: Any) -> None:
    """Raises BadArguments when `value` is not a Matrix that a tensor map can describe."""
    if not isinstance(value, Matrix):
        raise BadArguments(name=name, reason=f"'{argument}' must be a Matrix, not {type(value).__name__}")
    if len(value.shape) != len(value.strides) or value.strides[-1:] != (1,):
        raise BadArguments(name=name, reason=f"'{argument}' must have one stride a dim, the last of them 1")
    if value.address % 16:
        raise BadArguments(name=name, reason=f"'{argument}' must lie at a multiple of 16 bytes")
