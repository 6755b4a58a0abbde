"""The weights of an artifact as plain FP32 matrices, whatever their storage."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from moec.codegen.storage import stored_arrays
from moec.errors import InputError
from moec.ir import TensorType, Weight
from moec.ir.lane16 import format_of
from moec.runtime.plan import Argument
from moec.runtime.weights import Weights


class StorageWithoutExport(InputError):
    """A weight whose storage the exporter does not read."""

    template: ClassVar[str] = "weight @{name} is stored as {type}: export reads f32, bf16 and fp8_e4m3 in lane16"


def plain(weight: Weight, stored: Weights) -> NDArray[np.float32]:
    """All index points of a weight, `[points..., dims...]` in FP32; raises StorageWithoutExport or WrongWeights."""
    t = weight.type
    assert isinstance(t, TensorType)
    if t.layout not in (None, "lane16") or t.dtype not in ("f32", "bf16", "fp8_e4m3"):
        raise StorageWithoutExport(name=weight.name, type=t)
    arrays = [_bytes(stored, a.name, a.nbytes) for a in stored_arrays(weight)]
    lead = tuple(stop - start for _, start, stop in weight.indices)
    shape = (*lead, *(int(d) for d in t.shape))  # type: ignore[arg-type]
    if t.layout is None:
        return _f32(arrays[0], t.dtype).reshape(shape).numpy()
    first = stored_arrays(weight)[0]
    tiles, steps, rows, q = first.shape[-4:]
    data = _f32(arrays[0], t.dtype).reshape(*first.shape[:-4], tiles, steps, rows, q)
    x = data.transpose(-3, -2).reshape(*first.shape[:-4], tiles * rows, steps * q)
    if t.quant is not None:
        scale = torch.from_numpy(arrays[1]).view(torch.float32)
        if format_of(t.dtype, t.quant.block[-2]).row_scales:
            scale = scale.reshape(*first.shape[:-4], tiles, -1, rows).transpose(-2, -1).flatten(-3, -2)
        else:
            scale = scale.reshape(*first.shape[:-4], tiles, -1).repeat_interleave(rows, -2)
        x = x * scale.repeat_interleave(128, -1)[..., : x.shape[-1]]
    return x[..., : shape[-2], : shape[-1]].reshape(shape).contiguous().numpy()


def _bytes(stored: Weights, name: str, size: int) -> NDArray[np.uint8]:
    view: Any = stored.view(Argument(name, "weight", np.dtype(np.uint8), (size,)))
    return np.array(view)


def _f32(raw: NDArray[np.uint8], dtype: str) -> torch.Tensor:
    kinds = {"f32": torch.float32, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
    return torch.from_numpy(raw).view(kinds[dtype]).float()
