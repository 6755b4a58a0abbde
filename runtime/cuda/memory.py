"""The device's memory of a model: arena, cache, weights, inputs and logits, allocated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.ir.expr import evaluate
from moec.runtime.cuda.driver import Driver
from moec.runtime.cuda.program import INPUTS, GpuPlan
from moec.runtime.weights import Weights

ALIGN = 256
CHUNK = 64 << 20
"""Bytes of weights that are copied at a time: the file is never in memory as a whole."""


class DeviceMemory:
    """Allocates everything and streams the weights in. Raises OutOfMemory, which says for what."""

    def __init__(
        self,
        driver: Driver,
        plan: GpuPlan,
        weights: Weights | Mapping[str, int],
        vocab: int,
        table_width: int,
        stream: int,
        progress: Callable[[int, int], None] | None = None,
        tables: NDArray[np.int32] | None = None,
    ) -> None:
        """`tables`: which copy of an expert a token goes to, `Replicas.table` of each layer one behind the other."""
        self.driver = driver
        entries = plan.entries.values()
        largest = {
            "T": max(e.max_tokens for e in entries), "R": max(e.max_rows for e in entries),
            "B": max(e.max_sequences for e in entries), "N": table_width,
        }  # fmt: skip
        self.input_offsets: dict[str, int] = {}
        size = 0
        parts = max(e.parts for e in entries)
        for k in ("", *(f"_{number}" for number in range(parts if parts > 1 else 0))):
            for name, count in INPUTS.items():
                self.input_offsets[f"{name}{k}"] = size
                size += _up(4 * evaluate(count, largest))
        self.input_bytes = size
        # Micro-batches have room for equally many rows.
        largest["R"] = max(e.parts * e.most(e.max_rows) for e in entries)
        self.logits_bytes = 4 * largest["R"] * vocab
        self.inputs = driver.allocate(size, "the inputs of a step")
        self.arena = driver.allocate(_up(plan.arena_bytes), "the arena of activations")
        self.cache = driver.allocate(_up(plan.cache_bytes), "the key-value cache")
        self.logits = driver.allocate(_up(self.logits_bytes), "the logits")
        self.tokens = driver.allocate(_up(4 * largest["R"]), "the drawn tokens")
        self.host_tokens = driver.host_memory(4 * largest["R"])
        width, kind = plan.states
        self.states_row = width * (2 if kind == "bf16" else 4)
        self.states_kind = kind
        size_states = max(largest["T"] * self.states_row, 1)
        self.hidden = self.states = self.host_hidden = self.host_states = 0
        if width:
            self.hidden, self.states = (driver.allocate(_up(size_states), "hidden states") for _ in range(2))
            self.host_hidden, self.host_states = driver.host_memory(size_states), driver.host_memory(size_states)
        self.weights = self._load(weights, stream, progress) if isinstance(weights, Weights) else weights
        driver.zero(self.cache, plan.cache_bytes, stream)
        self.tables = 0
        if tables is not None:
            self.tables = driver.allocate(_up(tables.nbytes), "the placement of experts")
            driver.upload(self.tables, int(tables.ctypes.data), tables.nbytes, stream)
        self.host_inputs = driver.host_memory(size)
        self.host_logits = driver.host_memory(self.logits_bytes)
        driver.wait(stream)

    def _load(self, weights: Weights, stream: int, progress: Callable[[int, int], None] | None) -> Mapping[str, int]:
        """Every array at a multiple of 256 bytes of one allocation; the addresses by name."""
        total = sum(_up(a.nbytes) for _, a in weights.arrays())
        at = self.driver.allocate(max(total, ALIGN), "the weights")
        found, done = {}, 0
        for name, array in weights.arrays():
            found[name] = at
            host = int(array.ctypes.data)
            for start in range(0, array.nbytes, CHUNK):
                size = min(CHUNK, array.nbytes - start)
                self.driver.upload(at + start, host + start, size, stream)
                # The pages of the file that were read may go before the next are.
                self.driver.wait(stream)
                done += size
                if progress is not None:
                    progress(done, total)
            at += _up(array.nbytes)
        return found

    def input(self, name: str, count: int) -> NDArray[np.int32]:
        """Host memory of an input, to be filled before `send`."""
        return _view(self.host_inputs + self.input_offsets[name], count, np.int32)

    def send(self, stream: int) -> None:
        """Copy all inputs to the device."""
        self.driver.upload(self.inputs, self.host_inputs, self.input_bytes, stream)

    def receive(self, first: int, rows: int, vocab: int, stream: int) -> None:
        """Copy logits of `rows` from `first` on to the host."""
        at = 4 * first * vocab
        self.driver.download(self.host_logits + at, self.logits + at, 4 * rows * vocab, stream)

    def result(self, rows: int, vocab: int) -> NDArray[np.float32]:
        """The logits that were received, f32[rows, vocab]."""
        return _view(self.host_logits, rows * vocab, np.float32).reshape(rows, vocab)

    def receive_tokens(self, first: int, rows: int, stream: int) -> None:
        """Copy the drawn tokens of `rows` from `first` on to the host."""
        self.driver.download(self.host_tokens + 4 * first, self.tokens + 4 * first, 4 * rows, stream)

    def result_tokens(self, rows: int) -> list[int]:
        """The tokens that were received, of so many rows."""
        return _view(self.host_tokens, rows, np.int32).tolist()  # type: ignore[no-any-return]

    def send_hidden(self, states: NDArray[np.float32], stream: int) -> None:
        """Copy f32[T, H] to where the module that drafts reads its states."""
        size = len(states) * self.states_row
        if self.states_kind == "bf16":
            # They came as BF16, so that nothing is rounded here.
            _view(self.host_hidden, size // 2, np.uint16)[:] = (states.view(np.uint32) >> 16).ravel()
        else:
            _view(self.host_hidden, size // 4, np.float32)[:] = states.ravel()
        self.driver.upload(self.hidden, self.host_hidden, size, stream)

    def receive_states(self, rows: int, stream: int) -> None:
        """Copy the hidden states of a call to the host."""
        self.driver.download(self.host_states, self.states, rows * self.states_row, stream)

    def result_states(self, rows: int) -> NDArray[np.float32]:
        """The states that were received, f32[rows, H]."""
        if self.states_kind == "bf16":
            raw = _view(self.host_states, rows * self.states_row // 2, np.uint16)
            return (raw.astype(np.uint32) << 16).view(np.float32).reshape(rows, -1)
        return _view(self.host_states, rows * self.states_row // 4, np.float32).reshape(rows, -1)

    def address(self, reference: Mapping[str, Any], layer: int) -> int:
        """The device address of a step's argument for a layer of the loop."""
        name, offset = reference.get("name", ""), int(reference["offset"]) + layer * int(reference.get("layer", 0))
        match reference["base"]:
            case "arena":
                return self.arena + offset
            case "input":
                return self.inputs + self.input_offsets[str(name)] + offset
            case "weights":
                return self.weights[str(name)] + offset
            case "cache":
                return self.cache + offset
            case "placement":
                return self.tables + offset
            case _:
                places = {
                    "logits": self.logits, "tokens": self.tokens, "states": self.states, "hidden": self.hidden,
                }  # fmt: skip
                return places[str(name)] + offset


def _up(size: int) -> int:
    return -(-max(size, 1) // ALIGN) * ALIGN


def _view(address: int, count: int, dtype: Any) -> NDArray[Any]:
    import ctypes

    raw = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(raw, dtype=dtype)
