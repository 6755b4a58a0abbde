"""The weights of an artifact as plain FP32 matrices, whatever their storage."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from moec.codegen.storage import stored_arrays
from moec.errors import InputError
from moec.ir import TensorType, Weight
from moec.ir.lane16 import FORMATS, ROWS, format_of
from moec.runtime.plan import Argument
from moec.runtime.weights import Weights


class StorageWithoutExport(InputError):
    """A weight whose storage the exporter does not read."""

    template: ClassVar[str] = "weight @{name} is stored as {type}: export reads {known} in lane16"


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of E2M1 codes (OCP Microscaling Formats specification 1.0, sec. 5.3.3); the fourth bit is the sign."""


def plain(weight: Weight, stored: Weights) -> NDArray[np.float32]:
    """All index points of a weight, `[points..., dims...]` in FP32; raises StorageWithoutExport or WrongWeights."""
    t = weight.type
    assert isinstance(t, TensorType)
    if t.layout not in (None, "lane16") or t.dtype not in FORMATS or (t.layout is None and t.quant is not None):
        raise StorageWithoutExport(name=weight.name, type=t, known=", ".join(FORMATS))
    arrays = [_bytes(stored, a.name, a.nbytes) for a in stored_arrays(weight)]
    lead = tuple(stop - start for _, start, stop in weight.indices)
    shape = (*lead, *(int(d) for d in t.shape))  # type: ignore[arg-type]
    if t.layout is None:
        return _f32(arrays[0], t.dtype).reshape(shape).numpy()
    head = stored_arrays(weight)[0].shape[:-4]
    fmt = format_of(t.dtype, t.quant.block[-2] if t.quant else ROWS)
    tiles, steps, rows = fmt.shape(*shape[-2:])
    data = _f32(arrays[0], t.dtype).reshape(*head, tiles, steps, rows, fmt.per_lane)
    x = data.transpose(-3, -2).reshape(*head, tiles * rows, -1)
    if t.quant is not None:
        raw = torch.from_numpy(arrays[1])
        scale = torch.exp2(raw.float() - 127) if fmt.scale_dtype == "uint8" else raw.view(torch.float32)
        if fmt.row_scales:
            scale = scale.reshape(*head, tiles, -1, rows).transpose(-2, -1).flatten(-3, -2)
        else:
            scale = scale.reshape(*head, tiles, -1).repeat_interleave(rows, -2)
        x = x * scale.repeat_interleave(fmt.scale_block, -1)[..., : x.shape[-1]]
    return x[..., : shape[-2], : shape[-1]].reshape(shape).contiguous().numpy()


def _bytes(stored: Weights, name: str, size: int) -> NDArray[np.uint8]:
    view: Any = stored.view(Argument(name, "weight", np.dtype(np.uint8), (size,)))
    return np.array(view)


def _f32(raw: NDArray[np.uint8], dtype: str) -> torch.Tensor:
    if dtype == "fp4_e2m1":
        packed = torch.from_numpy(raw)
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten()
        return FP4[(codes & 7).long()] * (1 - 2 * (codes >> 3).float())
    kinds = {"f32": torch.float32, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
    return torch.from_numpy(raw).view(kinds[dtype]).float()
