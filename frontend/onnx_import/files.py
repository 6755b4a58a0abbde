"""Reading ONNX files: the graph, and the numbers of its tensors, from the file or from files beside it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, ClassVar

import onnx
import torch
from onnx import TensorProto, numpy_helper

from moec.errors import InputError, printable

DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
}


class OnnxError(InputError):
    """An ONNX file that cannot be imported."""

    template: ClassVar[str] = "{file}: {message}"


def read_model(path: Path) -> onnx.ModelProto:
    """The model without its external data; local functions are inlined. Raises OnnxError."""
    if not path.is_file():
        raise OnnxError(file=path, message="no such file")
    try:
        model = onnx.load_model(str(path), load_external_data=False)
        if model.functions:
            from onnx import inliner

            model = inliner.inline_local_functions(model)
    except Exception as error:  # the library raises its own and protobuf's errors
        raise OnnxError(file=path, message=f"is not an ONNX model ({type(error).__name__})") from None
    if not model.graph.node:
        raise OnnxError(file=path, message="is not an ONNX model (no nodes)")
    return model


def to_torch(tensor: TensorProto, path: Path) -> torch.Tensor:
    """A tensor's numbers; external data only from the folder of `path`. Raises OnnxError."""
    dtype = DTYPES.get(tensor.data_type)
    name, dims = printable(tensor.name), tuple(int(d) for d in tensor.dims)
    if dtype is None:
        kind = TensorProto.DataType.Name(tensor.data_type)
        raise OnnxError(file=path, message=f"tensor {name} is {kind.lower()}, which is not read")
    if any(d < 0 for d in dims):
        raise OnnxError(file=path, message=f"tensor {name} has dims {list(dims)}")
    if tensor.data_location == TensorProto.EXTERNAL:
        return _external(tensor, path, name, dims, dtype)
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != prod(dims) * dtype.itemsize:
            raise OnnxError(file=path, message=f"tensor {name} has {len(tensor.raw_data)} bytes, not those of {dims}")
        return _frombuffer(bytearray(tensor.raw_data), dims, dtype)
    try:
        array = numpy_helper.to_array(tensor)
        return torch.from_numpy(array.astype("float32") if dtype.itemsize < 4 else array.copy()).to(dtype)
    except Exception as error:
        raise OnnxError(file=path, message=f"tensor {name} cannot be read ({type(error).__name__})") from None


def _external(tensor: TensorProto, path: Path, name: str, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    entry: dict[str, Any] = {e.key: e.value for e in tensor.external_data}
    folder = path.parent.resolve()
    file = (folder / entry.get("location", "")).resolve()
    if not file.is_relative_to(folder) or file == folder:
        message = f"tensor {name} lies in {printable(entry.get('location', ''))}, outside of the model's folder"
        raise OnnxError(file=path, message=message)
    size = prod(dims) * dtype.itemsize
    try:
        start, length = int(entry.get("offset", 0)), int(entry.get("length", size))
        if start < 0 or length != size:
            raise ValueError
    except ValueError:
        raise OnnxError(file=path, message=f"tensor {name} gives no place of {size} bytes in {file.name}") from None
    if size == 0:
        return torch.empty(dims, dtype=dtype)
    try:
        if file.stat().st_size < start + size:
            raise OnnxError(file=path, message=f"tensor {name} ends behind the end of {file.name}")
        # A private map: nothing is read until it is needed, and nothing can be written back.
        storage = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    except OSError as error:
        raise OnnxError(file=path, message=f"{file.name}: {error.strerror}") from None
    whole = torch.tensor([], dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
    flat = whole[start : start + size]
    flat = flat if start % dtype.itemsize == 0 else flat.clone()
    return flat.view(dtype).reshape(dims)


def _frombuffer(data: bytearray, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if not data:
        return torch.empty(dims, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(dims)
