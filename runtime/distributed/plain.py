"""The collectives that take and give tensors as they lie, on any device; a tensor with scales is two tensors.

Each takes the axis, the op's attributes, what it reads and what it writes, and returns once the result is there (on a
GPU: once the current stream waits for it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from moec.ir.mesh import part
from moec.runtime.distributed.world import Axis

Tensor = torch.Tensor
Attrs = Mapping[str, Any]


def all_reduce(axis: Axis, attrs: Attrs, x: Tensor, y: Tensor) -> None:
    """y = the sum of x over the ranks; both may be one memory."""
    if not x.numel():
        return
    # The sum is made where it is to lie, if that is one piece.
    t = y if y.is_contiguous() else torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if t.data_ptr() != x.data_ptr():
        t.copy_(x)
    axis.run(dist.all_reduce, t)
    axis.count(_bytes(x) * 2 * (axis.size - 1) // axis.size)
    if t is not y:
        y.copy_(t)


def all_gather(axis: Axis, attrs: Attrs, x: Tensor, y: Tensor) -> None:
    """y = the parts of all ranks along `dim`; of rows the last parts may be shorter."""
    if not y.numel():
        return
    if attrs["dim"] != 0:
        parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(axis.size)]
        axis.run(dist.all_gather, parts, x.contiguous())
        y.copy_(torch.cat(parts, attrs["dim"]))
    else:
        # Parts of one size: the last ones are filled up.
        each = -(-len(y) // axis.size)
        mine = torch.zeros((each, *x.shape[1:]), dtype=x.dtype, device=x.device)
        mine[: len(x)] = x
        parts = [torch.empty_like(mine) for _ in range(axis.size)]
        axis.run(dist.all_gather, parts, mine)
        for i, p in enumerate(parts):
            first, stop = part(len(y), axis.size, i)
            y[first:stop] = p[: stop - first]
    axis.count(_bytes(x) * (axis.size - 1))


def reduce_scatter(axis: Axis, attrs: Attrs, x: Tensor, y: Tensor) -> None:
    """y = this rank's rows of the sum of x over the ranks."""
    if not x.numel():
        return
    each = -(-len(x) // axis.size)
    whole = torch.zeros((each * axis.size, *x.shape[1:]), dtype=x.dtype, device=x.device)
    whole[: len(x)] = x
    mine = torch.empty((each, *x.shape[1:]), dtype=x.dtype, device=x.device)
    axis.run(dist.reduce_scatter_tensor, mine, whole)
    axis.count(_bytes(x) * (axis.size - 1) // axis.size)
    y.copy_(mine[: len(y)])


def all_to_all(axis: Axis, attrs: Attrs, x: Tensor, y: Tensor) -> None:
    """Part i of x along `split` goes to rank i; y = what comes, joined along `join`."""
    sent = torch.stack(x.chunk(axis.size, attrs["split"]))
    got = torch.empty_like(sent)
    axis.run(dist.all_to_all_single, got, sent)
    axis.count(_bytes(x) * (axis.size - 1) // axis.size)
    y.copy_(torch.cat(list(got), attrs["join"]))


def rows(axis: Axis, attrs: Attrs, x: Tensor, y: Tensor) -> None:
    """y = this rank's part of the rows of x. Sends nothing."""
    first, stop = part(len(x), axis.size, axis.index)
    y.copy_(x[first:stop])


def send(axis: Axis, attrs: Attrs, x: Tensor) -> None:
    """x goes to the rank at place `to`."""
    if x.numel():
        axis.send(x.contiguous(), attrs["to"]).wait()
        axis.count(_bytes(x))


def recv(axis: Axis, attrs: Attrs, y: Tensor) -> None:
    """y comes from the rank at place `source`."""
    if y.numel():
        got = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        axis.recv(got, attrs["source"]).wait()
        y.copy_(got)


PLAIN: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (all_reduce, all_gather, reduce_scatter, all_to_all, rows, send, recv)
}


def run(name: str, axis: Axis, attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """A collective by its name, for each pair of a tensor read and one written."""
    for given in zip(inputs, outputs, strict=True) if inputs and outputs else ((t,) for t in (*inputs, *outputs)):
        PLAIN[name](axis, attrs, *given)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
