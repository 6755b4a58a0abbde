"""Paged latent cache of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, sec. 2.1.2).

One layer's cache is [pages, page_size, kv_rank + rope_dim] of f32 or bf16 (bit patterns as uint16): a position holds
the normed latent, then the rotated shared key. An fp8 cache is [pages, page_size, bytes of a row]: see `cache_fp8`.
page_table i32[sequences, max_pages] maps position p of sequence s to page page_table[s, p // page_size], slot p %
page_size.

    cache_append(latent, rope_key, seq, pos, page_table, cache, tokens)
        stores token t (latent[t, :kv_rank] | rope_key[t, :rope_dim]) at position pos[t] of sequence seq[t]
        seq, pos i32[tokens]; bf16 rounds to nearest even
    cache_gather(page_table, cache, out, sequence, length)
        out f32[length, ld_out] = positions 0 .. length-1 of one sequence, widened
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import cache_fp8
from moec.codegen.tvm.tir import Kernel, Machine, const, kernel_body
from moec.codegen.tvm.vector import (
    STORAGE,
    check_storage,
    foreach,
    load,
    load_as_f32,
    new_kernel,
    parallel_rows,
    pointers,
    row,
    scalars,
    store,
    store_from_f32,
)


@dataclass(frozen=True)
class CacheLayout:
    """What every user of one cache agrees on. `dtype`: "f32", "bf16" or "fp8"; `beside`: elements of an index key
    behind each position."""

    kv_rank: int
    rope_dim: int
    dtype: str
    max_pages: int
    page_size: int = 64
    beside: int = 0

    def __post_init__(self) -> None:
        if self.dtype != "fp8":
            check_storage("cache", self.dtype)

    @property
    def width(self) -> int:
        """Elements of one position, without what stands beside it."""
        return self.kv_rank + self.rope_dim

    @property
    def row(self) -> int:
        """Stored elements of one position."""
        return cache_fp8.row_bytes(self.kv_rank, self.rope_dim) if self.dtype == "fp8" else self.width + self.beside

    @property
    def storage(self) -> str:
        """The type that pointers to the cache are declared with."""
        return "uint8" if self.dtype == "fp8" else STORAGE[self.dtype]

    def __str__(self) -> str:
        """Part of the names of the kernels that use the cache."""
        beside = f"x{self.beside}" if self.beside else ""
        return f"{self.kv_rank}x{self.rope_dim}{beside}{self.dtype}_{self.max_pages}x{self.page_size}"


@dataclass(frozen=True)
class CacheAppendSpec:
    """Row strides of latent and rope_key in elements."""

    cache: CacheLayout
    max_tokens: int
    ld_latent: int
    ld_rope: int


@dataclass(frozen=True)
class CacheGatherSpec:
    """`ld_out`: row stride of the contiguous copy, at least the cache's width."""

    cache: CacheLayout
    max_length: int
    ld_out: int


def position_offset(page_table: Any, sequence: Any, position: Any, layout: CacheLayout) -> Any:
    """Element offset in the cache (int64) of one position of a sequence."""
    page = page_table[sequence * layout.max_pages + position // layout.page_size]
    slot = T.Cast("int64", page) * const(layout.page_size, "int64") + T.Cast("int64", position % layout.page_size)
    return T.Bind(slot * const(layout.row, "int64"))


def widen_position(cache: Any, source: Any, layout: CacheLayout, lanes: int, out: Any, target: Any) -> None:
    """out[target : target + width] = the position that starts at element `source`, in f32."""
    if layout.dtype == "fp8":

        def put(i: Any, value: Any, width: int) -> None:
            store(out, value, target + i, width)

        cache_fp8.widen_row(cache, source, layout.kv_rank, layout.rope_dim, lanes, put)
        return

    def widen(i: Any, width: int) -> None:
        store(out, load_as_f32(cache, source + i, width), target + i, width)

    foreach(layout.width, lanes, widen)


def build_cache_append(spec: CacheAppendSpec, machine: Machine) -> Kernel:
    """cache_append(latent, rope_key, seq, pos, page_table, cache, tokens)."""
    kernel = new_kernel("cache_append", spec)
    layout = spec.cache
    params = [
        *pointers("latent", "rope_key"),
        *pointers("seq", "pos", "page_table", dtype="int32"),
        *pointers("cache", dtype=layout.storage),
        *scalars("tokens"),
    ]
    with kernel_body(kernel, params) as (latent, rope_key, seq, pos, page_table, cache, tokens):

        def append(t: Any) -> None:
            target = position_offset(page_table, seq[t], pos[t], layout)
            if layout.dtype == "fp8":
                sizes = (layout.kv_rank, layout.rope_dim)
                at, rope_at = row(t, spec.ld_latent), row(t, spec.ld_rope)
                cache_fp8.narrow_row(cache, target, latent, at, rope_key, rope_at, sizes, machine.lanes)
                return
            for part, stride, begin, size in (
                (latent, spec.ld_latent, 0, layout.kv_rank),
                (rope_key, spec.ld_rope, layout.kv_rank, layout.rope_dim),
            ):
                source = row(t, stride)

                def put(i: Any, width: int, part: Any = part, source: Any = source, begin: int = begin) -> None:
                    store_from_f32(cache, load(part, source + i, width), target + begin + i, width)

                foreach(size, machine.lanes, put)

        parallel_rows(machine, tokens, spec.max_tokens, layout.width, append)
    return kernel


def build_cache_gather(spec: CacheGatherSpec, machine: Machine) -> Kernel:
    """cache_gather(page_table, cache, out, sequence, length)."""
    kernel = new_kernel("cache_gather", spec)
    layout = spec.cache
    params = [
        *pointers("page_table", dtype="int32"),
        *pointers("cache", dtype=layout.storage),
        *pointers("out"),
        *scalars("sequence", "length"),
    ]
    with kernel_body(kernel, params) as (page_table, cache, out, sequence, length):

        def copy(p: Any) -> None:
            source, target = position_offset(page_table, sequence, p, layout), row(p, spec.ld_out)
            widen_position(cache, source, layout, machine.lanes, out, target)

        parallel_rows(machine, length, spec.max_length, layout.width, copy)
    return kernel
