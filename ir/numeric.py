"""Numerics that several ops share: block quantisation, packed storage, rotary tables. Needs torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.ir.lane16 import ROWS, Format, format_of
from moec.ir.types import QUANTISED

TORCH = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
LARGEST = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "fp4_e2m1": 6.0, "i8": 127.0}
"""Greatest finite magnitude of each quantised element type (OCP OFP8 and MX specifications)."""

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


class NumericError(ValueError):
    """Values that a format cannot hold."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of an element type; raises NumericError where torch has none."""
    if name not in TORCH:
        raise NumericError(f"torch has no element type for {name}")
    return TORCH[name]


@dataclass
class Quantised:
    """Quantised data `[..., N, K]` with FP32 scales, one per block of the trailing dims (a 0 spans the dim).

    FP4 elements are kept as FP32 values of the format, since torch has no FP4 arithmetic.
    """

    data: torch.Tensor
    scale: torch.Tensor
    dtype: str
    block: tuple[int, ...]
    format: str = "f32"

    @property
    def shape(self) -> torch.Size:
        """Shape of the data."""
        return self.data.shape

    def rows(self, index: torch.Tensor | slice) -> Quantised:
        """Chosen rows of a matrix whose rows have scales of their own, or whose scale spans all rows."""
        scale = self.scale if self.block[-2] == 0 else self.scale[index]
        return Quantised(self.data[index], scale, self.dtype, self.block, self.format)

    def like(self, x: torch.Tensor) -> Quantised:
        """`x` quantised in the same way."""
        return quantise(x, self.dtype, self.block, self.format)

    def narrow(self, axis: int, start: int, length: int) -> Quantised:
        """Part of a dim; see `weight.slice`."""
        at = axis - (self.data.ndim - len(self.block))
        out = self if at < 0 or self.block[at] == 0 else self._finer(at, math.gcd(self.block[at], start))
        data = _bytes(out.data).narrow(axis, start, length).view(out.data.dtype)
        if at < 0:
            return replace(out, data=data, scale=out.scale.narrow(axis, start, length))
        if out.block[at] == 0:
            return replace(out, data=data)
        size = out.block[at]
        return replace(out, data=data, scale=out.scale.narrow(axis, start // size, -(-length // size)))

    def divide_rows(self, shape: tuple[int, ...]) -> Quantised:
        """Rows `[a·b, K]` as `[a, b, K]`; see `weight.reshape`."""
        a, b, _ = shape
        data = self.data.reshape(shape)
        if self.block[0] == 0:
            return replace(self, data=data, scale=self.scale.expand(a, *self.scale.shape))
        out = self._finer(0, math.gcd(self.block[0], b))
        return replace(out, data=data, scale=out.scale.reshape(a, b // out.block[0], -1))

    def permute(self, perm: tuple[int, ...]) -> Quantised:
        """Permuted dims; the last ones among themselves."""
        lead = self.data.ndim - len(self.block)
        block = tuple(self.block[p - lead] for p in perm[lead:])
        return replace(self, data=self.data.permute(perm), scale=self.scale.permute(perm), block=block)

    def _finer(self, at: int, size: int) -> Quantised:
        """The same values with blocks of `size` along blocked dim `at`, a divisor of their size."""
        axis = self.data.ndim - len(self.block) + at
        block = list(self.block)
        times, block[at] = self.block[at] // size, size
        scale = self.scale.repeat_interleave(times, axis).narrow(axis, 0, -(-self.data.shape[axis] // size))
        return replace(self, scale=scale, block=tuple(block))

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`data * scale` in `dtype`, computed in at least FP32."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.data.to(wide) * self.scale_per_element().to(wide)).to(dtype)

    def scale_per_element(self) -> torch.Tensor:
        """The scales repeated to the shape of the data."""
        s = self.scale
        lead = self.data.ndim - len(self.block)
        for axis, b in enumerate(self.block, start=lead):
            size = self.data.shape[axis]
            s = s.repeat_interleave(b or size, dim=axis).narrow(axis, 0, size)
        return s


def quantise(x: torch.Tensor, dtype: str, block: tuple[int, ...], scale_format: str) -> Quantised:
    """Quantise with scale `amax / largest` per block; ue8m0 scales are rounded up to a power of two *before* dividing.

    Raises NumericError for infinities, NaN and formats that are not quantised.
    """
    if dtype not in QUANTISED:
        raise NumericError(f"{dtype} is not a quantised type (known: {', '.join(QUANTISED)})")
    if (dtype == "logfmt10") != (scale_format == "logrange"):
        raise NumericError(f"{dtype} has no scales in {scale_format}")
    wide = x.to(torch.float32)
    if not torch.isfinite(wide).all():
        raise NumericError("cannot quantise infinities or NaN")
    lead = wide.ndim - len(block)
    sizes = [wide.shape[lead + i] if b == 0 else b for i, b in enumerate(block)]
    counts = [max(1, -(-wide.shape[lead + i] // s)) for i, s in enumerate(sizes)]
    pad: list[int] = []
    for i in reversed(range(len(block))):
        pad += [0, counts[i] * sizes[i] - wide.shape[lead + i]]
    split = [d for c, s in zip(counts, sizes, strict=True) for d in (c, s)]
    if dtype == "logfmt10":
        return _logfmt(wide, block)
    whole = not any(pad)
    blocked = (wide if whole else torch.nn.functional.pad(wide, pad)).reshape(*wide.shape[:lead], *split)
    inside = [lead + 2 * i + 1 for i in range(len(block))]
    amax = torch.maximum(blocked.amax(dim=inside), -blocked.amin(dim=inside))
    scale = amax / LARGEST[dtype]
    if scale_format == "ue8m0":
        # Exact, where the rounding of a logarithm would not be: scale = mantissa * 2^exponent with mantissa >= 1/2.
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    scale = torch.where(amax > 0, scale, torch.ones_like(scale))
    # A block of tiny values may have a subnormal scale; dividing by it would overflow the format.
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    out = Quantised(wide, scale, dtype, block, scale_format)
    scaled = blocked / scale[(..., *[part for _ in block for part in (slice(None), None)])]
    scaled = scaled.reshape(*wide.shape[:lead], *[c * s for c, s in zip(counts, sizes, strict=True)])
    out.data = _encode(scaled[tuple(slice(0, d) for d in wide.shape)], dtype)
    return out


def _logfmt(x: torch.Tensor, block: tuple[int, ...]) -> Quantised:
    """LogFMT by tiles of a row; torch has no such type: the values are kept in FP32, with scales of 1."""
    from moec.ir.logfmt import round_logfmt

    size = block[-1] or x.shape[-1]
    if any(b != 1 for b in block[:-1]):
        raise NumericError("LogFMT has tiles of one row")
    tiles = torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))  # type: ignore[no-untyped-call]
    data = round_logfmt(tiles).flatten(-2)[..., : x.shape[-1]]
    return Quantised(data, torch.ones(tiles.shape[:-1]), "logfmt10", block, "logrange")


def powers_of_two(scale: torch.Tensor) -> bool:
    """Whether all scales are positive powers of two."""
    return bool((torch.frexp(scale).mantissa == 0.5).all())


def _encode(x: torch.Tensor, dtype: str) -> torch.Tensor:
    limit = LARGEST[dtype]
    x = x.clamp(-limit, limit)
    if dtype == "i8":
        return x.round().to(torch.int8)
    if dtype == "fp4_e2m1":
        # Between 0 and 2 the format has steps of 1/2, then of 1, from 4 on of 2. Rounding ties to even multiples of a
        # step takes the value with an even code, as the MX specification asks.
        magnitude = x.abs()
        step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
        return (x / step).round() * step
    return x.to(TORCH[dtype])


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    """FP4 values `[..., K]` as their codes, two in a byte, the first in its low half: uint8 `[..., ceil(K/2)]`."""
    doubled = (values.abs() * 2).to(torch.uint8)  # 0, 1, 2, 3, 4, 6, 8, 12
    codes = torch.where(doubled > 4, (doubled >> 1) + 2 - (doubled == 12).to(torch.uint8), doubled)
    codes |= torch.signbit(values).to(torch.uint8) << 3
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def concat_quantised(parts: list[Quantised], axis: int) -> Quantised:
    """Join quantised parts; along a blocked axis the blocks shrink to what divides every inner boundary."""
    first = parts[0]
    lead = first.data.ndim - len(first.block)
    # torch does not join float8 tensors on every axis: join their bytes.
    raw = [_bytes(p.data) for p in parts]
    data = torch.cat(raw, axis).view(first.data.dtype)
    if axis < lead:
        return replace(first, data=data, scale=torch.cat([p.scale for p in parts], axis))
    at = axis - lead
    finer = math.gcd(first.block[at], *(p.data.shape[axis] for p in parts[:-1]))
    scales = []
    for p in parts:
        # A block of 0 spans its part: as many finer ones as the part has.
        size = p.block[at] or finer * -(-p.data.shape[axis] // finer)
        block = (*p.block[:at], size, *p.block[at + 1 :])
        scales.append(replace(p, block=block)._finer(at, finer).scale)
    block = (*first.block[:at], finer, *first.block[at + 1 :])
    return replace(first, data=data, scale=torch.cat(scales, axis), block=block)


def _bytes(data: torch.Tensor) -> torch.Tensor:
    """FP8 data as bytes: torch joins and cuts float8 tensors on some axes only."""
    return data.view(torch.uint8) if data.itemsize == 1 else data


def shard(x: torch.Tensor | Quantised, dim: int, ranks: int, parts: int, index: int) -> torch.Tensor | Quantised:
    """Part `index` of `ranks` of dim `dim`, of each of `parts` joined tensors; whole scale blocks of quantised ones."""

    def cut(t: torch.Tensor) -> torch.Tensor:
        # torch does not join float8 tensors on every axis: join their bytes.
        raw = t.view(torch.uint8) if t.itemsize == 1 else t
        return torch.cat([p.chunk(ranks, dim)[index] for p in raw.chunk(parts, dim)], dim).view(t.dtype)

    if isinstance(x, Quantised):
        return replace(x, data=cut(x.data), scale=cut(x.scale))
    return cut(x)


@dataclass
class Packed:
    """A matrix (or stack of matrices) `[..., N, K]` to be stored in the `lane16` layout."""

    value: torch.Tensor | Quantised

    @property
    def format(self) -> Format:
        """How the elements are stored."""
        v = self.value
        if isinstance(v, Quantised):
            return format_of(v.dtype, v.block[-2])
        return format_of({torch.float32: "f32", torch.bfloat16: "bf16"}[v.dtype])

    def data(self) -> torch.Tensor:
        """Lanes in storage order: int32 `[..., ceil(N/16), K'/q, 16]`, zero-padded."""
        raw = self.value.data if isinstance(self.value, Quantised) else self.value
        fmt = self.format
        n, k = raw.shape[-2:]
        tiles, groups, rows = fmt.shape(n, k)
        raw = raw.contiguous().view(torch.uint8) if fmt.bits >= 8 else _nibbles(raw)
        if (missing := tiles * rows - n) or groups * 4 != raw.shape[-1]:
            raw = torch.nn.functional.pad(raw, (0, groups * 4 - raw.shape[-1], 0, missing))
        elif raw.storage_offset() % 4:  # A tensor of a checkpoint's file may begin at any byte.
            raw = raw.clone()
        lanes = raw.view(torch.int32).reshape(*raw.shape[:-2], tiles, rows, groups)
        return lanes.transpose(-2, -1).contiguous()

    def scales(self) -> torch.Tensor | None:
        """Scales in storage order, as the format says; None when not quantised."""
        if not isinstance(self.value, Quantised):
            return None
        n, k = self.value.data.shape[-2:]
        fmt, scale = self.format, self.value.scale
        if fmt.scale_dtype == "uint8":
            # The least exponent, 2^-127, is subnormal in FP32: such weights are as good as zero, whatever their scale.
            scale = (torch.log2(scale).round() + 127).clamp(1, 254).to(torch.uint8)
            return self._by_row(scale, 1, 127)
        rows, columns = self.value.block[-2:]
        groups = -(-k // fmt.scale_block)
        # Blocks of fewer than 128 columns are as wide as the matrix: see `weight.pack`.
        scale = scale.repeat_interleave(max(1, columns // fmt.scale_block) if columns else groups, -1)
        scale = scale.narrow(-1, 0, groups)
        if fmt.row_scales:
            return self._by_row(scale, rows, 1.0)
        tiles = fmt.shape(n, k)[0]
        return scale.repeat_interleave(rows // ROWS or tiles, dim=-2).narrow(-2, 0, tiles).contiguous()

    def _by_row(self, scale: torch.Tensor, rows: int, fill: float) -> torch.Tensor:
        """Scales of blocks of `rows` rows as `[..., ceil(N/16), blocks of k, 16]`."""
        raw = self.value.data if isinstance(self.value, Quantised) else self.value
        n, k = raw.shape[-2:]
        tiles, blocks, size = self.format.scale_shape(n, k)
        scale = scale.repeat_interleave(rows, -2).narrow(-2, 0, n)
        padding = (0, blocks - scale.shape[-1], 0, tiles * size - n)
        scale = torch.nn.functional.pad(scale, padding, value=fill)
        return scale.reshape(*scale.shape[:-2], tiles, size, blocks).transpose(-2, -1).contiguous()

    def logical(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix that the stored bytes stand for, read back element by element as the layout says.

        Element (n, k) lies in lane (n / 16, k / q, n % 16), place k % q; its scale is that of its block of k.
        """
        raw = self.value.data if isinstance(self.value, Quantised) else self.value
        fmt, q = self.format, self.format.per_lane
        n, k = (torch.arange(size) for size in raw.shape[-2:])
        tile, row, block = (n // ROWS)[:, None], (n % ROWS)[:, None], (k // max(1, fmt.scale_block))[None]
        if fmt.bits >= 8:
            lanes = self.data().view(raw.dtype).reshape(*raw.shape[:-2], *fmt.shape(*raw.shape[-2:]), q)
            stored = lanes[..., tile, (k // q)[None], row, (k % q)[None]]
        else:
            codes = (self.data()[..., tile, (k // q)[None], row] >> (k % q * fmt.bits)) & 15
            stored = torch.where(codes < 8, _FP4[codes & 7], -_FP4[codes & 7])
        scales = self.scales()
        if scales is None:
            return stored.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale = (scales[..., tile, block, row] if fmt.row_scales else scales[..., tile, block]).to(wide)
        if fmt.scale_dtype == "uint8":
            scale = torch.exp2(scale - 127)
        return (stored.to(wide) * scale).to(dtype)


def logical(value: Any, dtype: torch.dtype) -> torch.Tensor:
    """The tensor that a weight value stands for, whatever its storage."""
    if isinstance(value, Packed):
        return value.logical(dtype)
    if isinstance(value, Quantised):
        return value.dequantise(dtype)
    assert isinstance(value, torch.Tensor)
    return value.to(dtype) if value.is_floating_point() else value


def rope_table(
    positions: int,
    dims: int,
    theta: float,
    factor: float,
    original: int,
    beta_fast: float,
    beta_slow: float,
    attention: float,
    truncate: bool,
    method: str = "yarn",
    factors: tuple[float, ...] = (),
    short_factors: tuple[float, ...] = (),
    short_attention: float = 1.0,
) -> torch.Tensor:
    """`[positions, cos(dims/2) | sin(dims/2)]` in FP32; see `weight.rope_table` for the arguments."""
    freq = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    if method == "linear":
        freq = freq / factor
    elif method == "factors":
        if positions <= original:
            factors, attention = short_factors, short_attention
        freq = 1.0 / (torch.tensor(factors) * theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
    elif method == "llama3":
        turns = original / (2 * math.pi / freq)
        kept = ((turns - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)
        freq = (1 - kept) * freq / factor + kept * freq
    elif factor > 1.0:

        def turns_at(turns: float) -> float:
            return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = turns_at(beta_fast), turns_at(beta_slow)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        ramp = ((torch.arange(dims // 2, dtype=torch.float32) - low) / (max(high - low, 0.001))).clamp(0, 1)
        freq = freq / factor * ramp + freq * (1 - ramp)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * freq
    return torch.cat((angles.cos(), angles.sin()), -1) * attention
