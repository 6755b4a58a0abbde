"""A stand-in for the CUDA driver library: device memory is host memory, and a launch runs in Triton's interpreter.

What a program asks of the driver is done in order with the very bytes that a device would get: packed parameters,
addresses in the arena, captured graphs. Wrong addresses are refused: every pointer must lie in an allocation; so is
what a capture does not allow (`capture.py`).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from capture import Captures

from moec.codegen.triton.problem import element_type
from moec.codegen.triton.spec import load_function

SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class StandIn:
    """One device of compute capability `capability` with `memory` bytes, running the kernels of an artifact folder."""

    def __init__(
        self, kernels: Path, capability: tuple[int, int] = (9, 0), memory: int = 1 << 33, version: int = 12080
    ) -> None:
        self.capability, self.free, self.memory, self.version = capability, memory, memory, version
        self.folder = kernels
        self.records = {r["launch"]["sha256"]: r for r in json.loads((kernels / "kernels.json").read_text())}
        self.blocks: dict[int, Any] = {}
        self.modules: list[Any] = []
        self.graphs: list[list[Callable[[], object]]] = []
        self.captures = Captures()
        self.launches: list[str] = []
        self.replays, self.handles = 0, 0
        self.order: list[tuple[str, int, int]] = []
        self.last: dict[str, Any] = {}
        self.maps = 0
        """Tensor maps that were encoded."""
        self.downloads: list[int] = []

    # -- what is only answered

    def cuInit(self, flags: int) -> int:
        return 0

    def cuGetErrorName(self, status: int, out: Any) -> int:
        out._obj.value = b"CUDA_ERROR_%d" % status
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = 1
        return 0

    def cuDeviceGetAttribute(self, out: Any, number: int, device: Any) -> int:
        out._obj.value = {75: self.capability[0], 76: self.capability[1]}[number]
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = self.free, self.memory
        return 0

    def cuDeviceGetName(self, out: Any, size: Any, device: Any) -> int:
        out.value = b"stand-in"
        return 0

    def cuEventElapsedTime(self, out: Any, start: Any, end: Any) -> int:
        out._obj.value = self.milliseconds(self.last)
        return 0

    def milliseconds(self, record: dict[str, Any]) -> float:
        """What a launch takes on the clock of this device."""
        return 1.0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cu") and name in {
            "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuFuncSetAttribute",
            "cuFuncGetAttribute",
            "cuGraphDestroy",
        }:  # fmt: skip
            return lambda *arguments: 0
        raise AttributeError(name)

    # -- streams: everything runs in the order of issue; what waits for what is noted

    def cuStreamCreate(self, out: Any, flags: Any) -> int:
        self.handles += 1
        out._obj.value = self.handles
        return 0

    cuEventCreate = cuStreamCreate

    def cuStreamSynchronize(self, stream: Any) -> int:
        return self.captures.synchronise(stream.value)

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        self.order.append(("record", event.value, stream.value))
        return self.captures.record(event.value, stream.value)

    def cuStreamWaitEvent(self, stream: Any, event: Any, flags: Any) -> int:
        assert any(kind == "record" and e == event.value for kind, e, _ in self.order), "an event that never happens"
        self.order.append(("wait", event.value, stream.value))
        return self.captures.wait(stream.value, event.value)

    # -- memory

    def cuMemAlloc_v2(self, out: Any, size: Any) -> int:
        if size.value > self.free:
            return 2
        if refused := self.captures.unsafe():
            return refused
        self.free -= size.value
        block = ctypes.create_string_buffer(b"\x7f" * size.value, size.value + 256)
        address = -(-ctypes.addressof(block) // 256) * 256
        self.blocks[address] = (block, size.value)
        out._obj.value = address
        return 0

    def cuMemAllocHost_v2(self, out: Any, size: Any) -> int:
        block = ctypes.create_string_buffer(size.value)
        self.modules.append(block)
        out._obj.value = ctypes.addressof(block)
        return 0

    def inside(self, address: int, size: int = 1) -> int:
        """`address`, which must lie in an allocation with all of `size` bytes."""
        for start, (_, length) in self.blocks.items():
            if start <= address and address + size <= start + length:
                return address
        raise AssertionError(f"{size} bytes at {address:#x} are in no allocation")

    def do(self, stream: Any, action: Callable[[], object]) -> int:
        """Done at once, or noted where the stream is being captured."""
        if self.captures.note(stream.value, action):
            return 0
        action()
        return 0

    def cuMemcpyHtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> int:
        at = self.inside(to.value, size.value)
        return self.do(stream, lambda: ctypes.memmove(at, source.value, size.value))

    def cuMemcpyDtoHAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> int:
        at = self.inside(source.value, size.value)

        def copy() -> None:
            self.downloads.append(size.value)
            ctypes.memmove(to.value, at, size.value)

        return self.do(stream, copy)

    def cuMemcpyDtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> int:
        a, b = self.inside(to.value, size.value), self.inside(source.value, size.value)
        return self.do(stream, lambda: ctypes.memmove(a, b, size.value))

    def cuMemsetD8Async(self, to: Any, value: Any, size: Any, stream: Any) -> int:
        at = self.inside(to.value, size.value)
        return self.do(stream, lambda: ctypes.memset(at, value.value, size.value))

    # -- graphs

    def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:
        assert mode.value == 1, "other threads may do what a capture of this one must not"
        return self.captures.begin(stream.value)

    def cuStreamEndCapture(self, stream: Any, out: Any) -> int:
        status, noted = self.captures.end(stream.value)
        self.graphs.append(noted)
        out._obj.value = len(self.graphs)
        return status

    def cuGraphInstantiateWithFlags(self, out: Any, graph: Any, flags: Any) -> int:
        out._obj.value = graph.value
        return 0

    def cuGraphLaunch(self, graph: Any, stream: Any) -> int:
        self.replays += 1
        assert not self.captures.note(stream.value, lambda: None), "a graph is replayed inside a capture"
        for action in self.graphs[graph.value - 1]:
            action()
        return 0

    # -- kernels

    def cuModuleLoadData(self, out: Any, image: bytes) -> int:
        self.modules.append(self.known(image))
        out._obj.value = len(self.modules)
        return 0

    def known(self, image: bytes) -> dict[str, Any]:
        """The record of a cubin."""
        return self.records[hashlib.sha256(image).hexdigest()]  # type: ignore[no-any-return]

    def cuModuleGetFunction(self, out: Any, module: Any, symbol: bytes) -> int:
        assert self.modules[module.value - 1]["launch"]["symbol"].encode() == symbol
        out._obj.value = module.value
        return 0

    def cuLaunchKernel(
        self, function: Any, x: int, y: int, z: int, threads: int, ty: int, tz: int, shared: int, stream: Any,
        packed: Any, extra: Any,
    ) -> int:  # fmt: skip
        record = self.modules[function.value - 1]
        arguments: dict[str, Any] = {}
        addresses = iter(packed)
        for name, kind, _ in record["launch"]["parameters"]:
            address = next(addresses)
            if kind.startswith("*"):
                arguments[name] = self.tensor(ctypes.c_uint64.from_address(address).value, kind)
            elif kind.startswith("tensordesc"):
                sizes = [ctypes.c_int32.from_address(next(addresses)).value for _ in range(2)]
                strides = [ctypes.c_int64.from_address(next(addresses)).value for _ in range(2)]
                arguments[name] = self.descriptor(kind, address, sizes, strides)
            else:
                scalar: Any = SCALARS[kind].from_address(address)
                arguments[name] = scalar.value
        assert len(list(addresses)) == 2, "two scratch pointers end the parameters"
        return self.do(stream, lambda: self.launch(record, (x, y, z), arguments))

    def cuTensorMapEncodeTiled(
        self, out: Any, data_type: int, rank: Any, address: Any, sizes: Any, strides: Any, box: Any, steps: Any,
        interleave: int, swizzle: int, promotion: int, fill: int,
    ) -> int:  # fmt: skip
        """Notes what the map describes in its bytes; refuses what the driver's reference refuses of a matrix."""
        fits = rank.value == 2 and all(1 <= n < 1 << 32 for n in sizes) and all(1 <= n <= 256 for n in box)
        if not fits or address.value % 16 or strides[0] % 16 or out.value % 128:
            return 1
        self.inside(address.value, (sizes[1] - 1) * strides[0] + 1)
        noted = (ctypes.c_uint64 * 6)(address.value, sizes[1], sizes[0], strides[0], box[1], box[0])
        ctypes.memmove(out.value, noted, ctypes.sizeof(noted))
        self.maps += 1
        return 0

    def descriptor(self, kind: str, address: int, sizes: list[int], strides: list[int]) -> Any:
        """The descriptor that a tensor map describes, which sizes and strides of the launch must agree with."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        at, rows, columns, distance, *box = (ctypes.c_uint64 * 6).from_address(address)
        dtype = element_type(kind)
        assert [rows, columns] == sizes and [distance // dtype.itemsize, 1] == strides
        raw = (ctypes.c_uint8 * ((rows - 1) * distance + columns * dtype.itemsize)).from_address(at)
        flat = torch.frombuffer(raw, dtype=torch.uint8).view(dtype)
        return TensorDescriptor.from_tensor(flat.as_strided(sizes, strides), box)

    def tensor(self, address: int, kind: str) -> torch.Tensor:
        """A tensor that begins at an address of the device."""
        dtype = element_type(kind)
        self.inside(address, dtype.itemsize)
        raw = (ctypes.c_uint8 * dtype.itemsize).from_address(address)
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype)

    def launch(self, record: dict[str, Any], grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Run a kernel's source, as the artifact holds it, with the constants that it was compiled with."""
        about = record["launch"]
        module = about["function"].partition(":")[0]
        text = (self.folder / f"{module}.py").read_text()
        function = load_function(about["function"], text)
        self.launches.append(record["name"])
        self.last = record
        function[grid](**arguments, **about["constants"])


def tensor_map(kind: str) -> dict[str, Any]:
    """What the compiler records of a descriptor, but for the swizzle."""
    box = [int(n) for n in kind[kind.index("[") + 1 : kind.index("]")].split(",")]
    return {"box": box, "element_bytes": element_type(kind).itemsize, "data_type": 0, "swizzle": 0}


def fake_compile(instance: Any) -> Any:
    """What ahead-of-time compilation gives, without compiling: the stand-in runs the source."""
    from moec.codegen.triton import aot
    from moec.codegen.triton.arch import architecture

    name = instance.name + json.dumps(aot.request_of(instance)["key"])
    instruction = architecture(instance.arch).tensor_instruction if instance.spec.tensor_core else None
    facts = {
        "registers": 0, "spill_stores": 0, "shared_bytes": 0, "tensor_instruction": instruction,
        "symbol": instance.spec.name, "serialised": False, "parameters": aot.parameter_count(instance),
        "threads": 32 * instance.tile.num_warps, "global_scratch": 0, "seconds": 0.0,
        "tensor_maps": [tensor_map(kind) for kind in instance.signature.values() if kind.startswith("tensordesc")],
    }  # fmt: skip
    return aot.Compiled(instance, name.encode(), b"", facts, False)
