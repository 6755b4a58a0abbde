"""Standard ONNX operators that move elements: views, slices, joins, and reads and writes by index."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moec.frontend.onnx_import.pieces import Pieces, Unsupported, permute
from moec.frontend.onnx_import.standard import FAR, Op
from moec.frontend.onnx_import.values import Call, ints, known, number, operand, tensor


def transpose(c: Call, x: Any) -> Any:
    """Dims in another order."""
    if isinstance(x, Pieces):
        return x.permuted(list(c.attr("perm")))
    x = tensor(x)
    return permute(x, list(c.attr("perm", list(range(x.ndim))[::-1])))


def shape(c: Call, x: Any) -> Any:
    """Sizes, from `start` to `end`."""
    if isinstance(x, Pieces):
        part = x.parts[0][2]
        dims = [x.size if d == x.axis else part.shape[d] for d in range(part.ndim)]
    else:
        dims = list(x.shape)
    return np.array(dims[c.attr("start", 0) : c.attr("end")], dtype=object)


def size(c: Call, x: Any) -> Any:
    """How many elements."""
    return np.array(x.numel(), dtype=object)


def reshape(c: Call, x: Any, to: Any) -> Any:
    """Other dims: 0 keeps one, unless `allowzero`; -1 is what is left."""
    x = tensor(x)
    zero = bool(c.attr("allowzero", 0))
    dims = [x.shape[i] if isinstance(d, int) and d == 0 and not zero else d for i, d in enumerate(ints(to))]
    laid_down = c.origin(0, "Transpose")
    heads = getattr(laid_down[0], "heads_of", None) if laid_down is not None and x.ndim == 3 else None
    if heads is not None and dims == [*heads.shape[:2], heads.shape[3], heads.shape[2]]:
        return heads.transpose(-1, -2)
    out: Any = x.reshape(dims)
    if x.ndim == 4 and out.ndim == 3 and list(out.shape[1:]) == list(x.shape[2:]):
        # Matrices of all heads, which may be transposed before they are heads again.
        out.heads_of = x
    return out


def flatten(c: Call, x: Any) -> Any:
    """Two dims: those before the axis, and the rest."""
    axis = c.attr("axis", 1) % (x.ndim + 1)
    return x.reshape(1, -1) if axis == 0 else x.flatten(0, axis - 1).flatten(1) if axis < x.ndim else x.reshape(-1, 1)


def squeeze(c: Call, x: Any, axes: Any = None) -> Any:
    """Without dims of one."""
    x = tensor(x)
    over = c.attr("axes") if axes is None else ints(axes)
    over = [d for d in range(x.ndim) if isinstance(x.shape[d], int) and x.shape[d] == 1] if over is None else over
    for axis in sorted((int(a) % x.ndim for a in over), reverse=True):
        x = x.squeeze(axis)
    return x


def unsqueeze(c: Call, x: Any, axes: Any = None) -> Any:
    """With dims of one."""
    x = tensor(x)
    over = c.attr("axes") if axes is None else ints(axes)
    rank = x.ndim + len(over)
    for axis in sorted(int(a) % rank for a in over):
        x = x.unsqueeze(axis)
    return x


def expand(c: Call, x: Any, to: Any) -> Any:
    """Broadcast to a shape."""
    x, dims = tensor(x), ints(to)
    lead = len(dims) - x.ndim
    sizes = [d if i < lead or _one(x.shape[i - lead]) else x.shape[i - lead] for i, d in enumerate(dims)]
    return x.expand([*x.shape[: max(0, -lead)], *sizes] if lead < 0 else sizes)


def _one(dim: Any) -> bool:
    return isinstance(dim, int) and dim == 1


def tile(c: Call, x: Any, repeats: Any) -> Any:
    """Repeated along each dim."""
    return tensor(x).repeat(ints(repeats))


def slice_(c: Call, x: Any, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Any:
    """Ranges of some dims."""
    x = tensor(x)
    first = c.attr("starts") if starts is None else ints(starts)
    last = c.attr("ends") if ends is None else ints(ends)
    over = c.attr("axes") if axes is None else ints(axes)
    for i, axis in enumerate(over if over is not None else range(len(first))):
        start, stop, step = first[i], last[i], 1 if steps is None else ints(steps)[i]
        if not isinstance(step, int) or step < 1:
            raise Unsupported("a slice backwards")
        axis = int(axis) % x.ndim
        if isinstance(start, int) and start < 0:
            start = max(0, start + x.shape[axis]) if isinstance(x.shape[axis], int) else start + x.shape[axis]
        if isinstance(stop, int) and stop < 0 and isinstance(x.shape[axis], int):
            stop = stop + x.shape[axis]
        if isinstance(stop, int) and stop > FAR:
            stop = (1 << 63) - 1
        rest = (step,) if step != 1 else ()
        x = torch.ops.aten.slice.Tensor(x, axis, start, stop, *rest)
    return x


def split(c: Call, x: Any, sizes: Any = None) -> Any:
    """Parts of one dim."""
    x, axis = tensor(x), c.attr("axis", 0)
    given = c.attr("split") if sizes is None else ints(sizes)
    if given is None:
        count = len(c.step.outputs)
        each = -(-int(x.shape[axis]) // count)
        given = [min(each, int(x.shape[axis]) - i * each) for i in range(count)]
    return torch.split(x, given, axis)


def concat(c: Call, *values: Any) -> Any:
    """Joined along one dim; what is empty there is left away, as a cache before the first token."""
    parts, axis = [tensor(v) for v in values], c.attr("axis")
    apart = [c.origin(i, "Unsqueeze") for i in range(len(values))]
    if axis in (-1, parts[0].ndim - 1) and all(a is not None and parts[0].shape[-1] == 1 for a in apart):
        return torch.stack(
            [p.squeeze(-1) if a is None else tensor(a[0]) for a, p in zip(apart, parts, strict=True)], -1
        )
    parts = [p for p in parts if not (isinstance(p.shape[axis], int) and p.shape[axis] == 0)] or parts[:1]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def gather(c: Call, x: Any, index: Any) -> Any:
    """Entries of one dim: rows of the embedding, the weights of chosen experts, or one place."""
    axis, single, where = c.attr("axis", 0), number(index), known(index)
    x = tensor(x)
    if where is not None and where.ndim == 0:
        if isinstance(single, int) and single < 0:
            single += x.shape[axis]
        return x.select(axis, single)
    at = tensor(index)
    if axis % x.ndim:
        return _rows(x, axis, at)
    if x.ndim == 2 and getattr(at, "is_ids", False):
        return F.embedding(at, x)
    return x[at]


def _rows(x: torch.Tensor, axis: int, at: torch.Tensor) -> torch.Tensor:
    axis %= x.ndim
    taken = torch.index_select(x, axis, at.reshape(-1))
    return taken.reshape([*x.shape[:axis], *at.shape, *x.shape[axis + 1 :]])


def gather_elements(c: Call, x: Any, index: Any) -> Any:
    """An entry for each index along one dim."""
    return torch.gather(tensor(x), c.attr("axis", 0), tensor(index))


def gather_nd(c: Call, x: Any, index: Any) -> Any:
    """Entries by several indices, which lie in the last dim."""
    if c.attr("batch_dims", 0):
        raise Unsupported("entries by index within a batch")
    single = c.origin(1, "Unsqueeze")
    x, at = tensor(x), tensor(index)
    if at.shape[-1] == 1 and single is not None and isinstance(single[0], torch.Tensor):
        return x[single[0]]
    return x[tuple(at[..., i] for i in range(int(at.shape[-1])))]


def scatter_elements(c: Call, x: Any, index: Any, updates: Any) -> Any:
    """Values written to an index along one dim."""
    if c.attr("reduction", "none") != "none":
        raise Unsupported("values added by index")
    at = tensor(index)
    given = operand(updates) if at.numel() == 1 else tensor(updates)
    return torch.scatter(tensor(x), c.attr("axis", 0), at, given)


def scatter_nd(c: Call, x: Any, index: Any, updates: Any) -> Any:
    """Values written into a run of the first dim: one part of a tensor that is put together."""
    rows = known(index)
    if rows is None or rows.ndim != 2 or rows.shape[1] != 1 or c.attr("reduction", "none") != "none":
        raise Unsupported("values written by index")
    start, stop = int(rows[0, 0]), int(rows[-1, 0]) + 1
    if rows[:, 0].tolist() != list(range(start, stop)):
        raise Unsupported("values written by index")
    before = x if isinstance(x, Pieces) and x.axis == 0 else Pieces(0, int(x.shape[0]), ())
    kept = [p for p in before.parts if p[1] <= start or p[0] >= stop]
    if len(kept) != len(before.parts):
        raise Unsupported("values written twice")
    parts = sorted([*kept, (start, stop, tensor(updates))], key=lambda p: p[0])
    return Pieces(0, before.size, tuple(parts))


MOVING: dict[str, Op] = {
    "Concat": concat,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Reshape": reshape,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "Shape": shape,
    "Size": size,
    "Slice": slice_,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
