"""The communicator of ranks with a GPU each: torch.distributed on tensors that lie in the engine's device memory.

Packing and unpacking are kernels of the program; what is left here is to move rows. How many come is known only once
the ranks have told each other: `start` stops there, so that the caller can give the device other work meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from moec.ir.expr import evaluate
from moec.runtime.cuda.memory import DeviceMemory
from moec.runtime.cuda.program import DeviceView, Exchange
from moec.runtime.distributed import plain
from moec.runtime.distributed.world import Axis, World

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i32": torch.int32,
    "u8": torch.uint8,
}


class DeviceTensors:
    """Views of device memory as torch tensors. `host`: the device is a stand-in whose memory is the host's."""

    def __init__(self, memory: DeviceMemory, host: bool) -> None:
        self.memory, self.host = memory, host

    def tensor(self, view: DeviceView, sizes: Mapping[str, int], layer: int) -> torch.Tensor:
        """The rows of a view that are in use."""
        shape = [evaluate(d, sizes) for d in view.shape]
        dtype = DTYPES[view.dtype]
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device="cpu" if self.host else "cuda")
        rows, columns = (1, shape[0]) if len(shape) == 1 else shape
        count = (rows - 1) * view.ld + columns
        address = self.memory.address(view.at, layer)
        flat = self.bytes(address, count * dtype.itemsize).view(dtype)
        return flat if len(shape) == 1 else flat.as_strided((rows, columns), (view.ld, 1))

    def bytes(self, address: int, size: int) -> torch.Tensor:
        """u8[size] at an address."""
        if self.host:
            return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
        return torch.as_tensor(_DeviceArray(address, size), device="cuda")

    def stream(self, stream: int) -> AbstractContextManager[Any]:
        """Inside, torch gives its work to a stream of the engine."""
        if self.host:
            return nullcontext()
        return torch.cuda.stream(torch.cuda.ExternalStream(stream))  # type: ignore[no-untyped-call]


class _DeviceArray:
    """Device memory by the CUDA array interface (version 3)."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


class DeviceCollectives:
    """Runs the exchanges of one rank's program."""

    def __init__(self, world: World, tensors: DeviceTensors) -> None:
        self.world, self.tensors = world, tensors
        self._moved: dict[str, tuple[list[int], list[int]]] = {}
        """Rows to and from every rank of the dispatches whose results are still out, by the handle's place."""

    def start(self, op: Exchange, layer: int, sizes: dict[str, int]) -> Iterator[None]:
        """Run an exchange. One whose size is not known yet stops once while ranks tell each other; going on waits.

        A dispatch sets in `sizes` what its rows are named by. Raises RuntimeError when a peer is gone or late.
        """
        axis = self.world.axes[op.axis]
        inputs, outputs = op.inputs, op.outputs
        if op.name in plain.PLAIN:
            read, written = ([self.tensors.tensor(v, sizes, layer) for v in views] for views in (inputs, outputs))
            plain.run(op.name, axis, op.attrs, read, written)
        elif op.name == "dispatch_rows":
            *packed, counts = (self.tensors.tensor(v, sizes, layer) for v in inputs)
            came = self.tensors.tensor(outputs[-1], sizes, layer)
            told = _Told(axis, counts, came)
            yield
            sent, got = told.wait()
            sizes[op.attrs["rows"]] = sum(got)
            self._moved[_key(outputs[-1])] = sent, got
            arrived = [self.tensors.tensor(v, sizes, layer) for v in outputs[:-1]]
            _move(axis, packed, arrived, sent, got)
        else:
            sent, got = self._moved.pop(_key(inputs[-1]))
            results = [self.tensors.tensor(v, {**sizes, op.attrs["rows"]: sum(got)}, layer) for v in inputs[:-1]]
            home = [self.tensors.tensor(v, sizes, layer) for v in outputs]
            _move(axis, results, home, got, sent)


class _Told:
    """How many rows ranks send each other: i32[ranks * slots of one] of this rank's, exchanged for theirs."""

    def __init__(self, axis: Axis, counts: torch.Tensor, came: torch.Tensor) -> None:
        self.size = axis.size
        self.work = axis.start(dist.all_to_all_single, came, counts)
        self.counts, self.came = counts, came
        self.event: Any = None
        if counts.is_cuda:
            self.work.wait()  # the stream waits, not the host
            # A copy into memory that is not page-locked would hold the host up.
            self.told = torch.empty((2, self.size), dtype=torch.int64, pin_memory=True)
            self.told.copy_(self._sums(), non_blocking=True)
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record()

    def _sums(self) -> torch.Tensor:
        return torch.stack([c.view(self.size, -1).sum(1) for c in (self.counts, self.came)])

    def wait(self) -> tuple[list[int], list[int]]:
        """Rows to each rank and from each."""
        if self.event is None:
            self.work.wait()
            self.told = self._sums()
        else:
            self.event.synchronize()
        sent, got = self.told.tolist()
        return sent, got


def _move(axis: Axis, x: list[torch.Tensor], y: list[torch.Tensor], sent: list[int], got: list[int]) -> None:
    """Consecutive rows of every x, `sent[i]` to rank i; y takes `got[i]` from each."""
    works = [axis.move_rows(b[: sum(got)], a[: sum(sent)], sent, got) for a, b in zip(x, y, strict=True)]
    for work in works:
        work.wait()


def _key(view: DeviceView) -> str:
    return f"{view.at['base']} {view.at['offset']}"
