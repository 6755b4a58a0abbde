# mypy: ignore-errors
"""What surrounds an all-to-all between ranks that hold experts: the slot of every pair, the order of what arrives."""

import triton
import triton.language as tl


@triton.jit
def choose_slots(
    index_ptr, table_ptr, live_ptr, slot_ptr, count_ptr, PAIRS, source,
    E: tl.constexpr, SLOTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """index[PAIRS = T*TOP_K] -> the slot of every pair, -1 for tokens from live[0] on; one program an expert.

    Adds each slot's pairs to count[SLOTS]. The n-th pair of an expert goes to the copy whose share holds the n-th term
    of Weyl's sequence, which starts elsewhere for every `source` (`ir/replicas.py`, whose fixed-point table this reads:
    where each of the E experts' copies begin, their slots, and where their shares end, as fractions of 2**32).
    """
    e = tl.program_id(0)
    first = tl.load(table_ptr + e)
    stop = tl.load(table_ptr + e + 1)
    slots = table_ptr + E + 1
    ends = slots + SLOTS
    live = tl.load(live_ptr) * TOP_K
    ri = tl.arange(0, BLOCK)
    number = first * 0
    for begin in range(0, PAIRS, BLOCK):
        pair = begin + ri
        expert = tl.load(index_ptr + pair, mask=pair < PAIRS, other=-1)
        hit = (expert == e) & (pair < live)
        n = number + tl.cumsum(hit.to(tl.int32), 0) - 1
        # Half the golden ratio's fraction in units of 2**-32: (2 n + 1) of them are the (n + 1/2)-th term.
        term = ((2 * n + 1 + 14 * source).to(tl.int64) * 1327217885) & 0xFFFFFFFF
        chosen = tl.zeros((BLOCK,), dtype=tl.int32) + tl.load(slots + first)
        for copy in range(first, stop - 1):
            end = tl.load(ends + copy).to(tl.int64) & 0xFFFFFFFF
            chosen = tl.where(term >= end, tl.load(slots + copy + 1), chosen)
        tl.store(slot_ptr + pair, chosen, mask=hit)
        tl.atomic_add(count_ptr + chosen, tl.full((BLOCK,), 1, tl.int32), mask=hit)
        if e == 0:
            nobody = (pair >= live) & (pair < PAIRS)
            tl.store(slot_ptr + pair, tl.full((BLOCK,), -1, tl.int32), mask=nobody)
        number += tl.sum(hit.to(tl.int32), 0)


@triton.jit
def sort_arrived(
    count_ptr, source_ptr, place_ptr, block_expert_ptr, ROWS,
    RANKS: tl.constexpr, RANKS2: tl.constexpr, LOCAL: tl.constexpr, LOCAL2: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """count[RANKS, LOCAL], rows that came from each rank for each slot here -> their order by slot; one program a slot.

    Rows arrive rank by rank, each rank's by slot. source[ROWS] is the arrived row at every place of the sorted rows
    (-1: padding), place[arrived rows] its inverse; slots are padded to ALIGN rows, whose blocks name them in
    block_expert[ROWS/ALIGN] (-1 past the last).
    """
    s = tl.program_id(0)
    r = tl.arange(0, RANKS2)
    l = tl.arange(0, LOCAL2)
    inside = (r < RANKS)[:, None] & (l < LOCAL)[None, :]
    count = tl.load(count_ptr + r[:, None] * LOCAL + l[None, :], mask=inside, other=0)
    total = tl.sum(count, 0)
    start = tl.sum(tl.where(l < s, tl.cdiv(total, ALIGN) * ALIGN, 0), 0)
    own = tl.sum(tl.where(l == s, total, 0), 0)
    end = start + tl.cdiv(own, ALIGN) * ALIGN
    for block in range(start // ALIGN, end // ALIGN):
        tl.store(block_expert_ptr + block, s)
    if s == LOCAL - 1:
        for block in range(end // ALIGN, ROWS // ALIGN):
            tl.store(block_expert_ptr + block, -1)
        end = ROWS
    came = tl.sum(count, 1)
    # Rows before this slot's: those of earlier ranks, and of earlier slots of the same one.
    arrived = tl.cumsum(came, 0) - came + tl.sum(tl.where((l < s)[None, :], count, 0), 1)
    mine = tl.sum(tl.where((l == s)[None, :], count, 0), 1)
    sorted_ = start + tl.cumsum(mine, 0) - mine
    ri = tl.arange(0, BLOCK)
    for rank in range(RANKS):
        here = r == rank
        rows = tl.sum(tl.where(here, mine, 0), 0)
        source = tl.sum(tl.where(here, arrived, 0), 0)
        place = tl.sum(tl.where(here, sorted_, 0), 0)
        for begin in range(0, rows, BLOCK):
            i = begin + ri
            tl.store(source_ptr + place + i, source + i, mask=i < rows)
            tl.store(place_ptr + source + i, place + i, mask=i < rows)
    for begin in range(start + own, end, BLOCK):
        at = begin + ri
        tl.store(source_ptr + at, tl.full((BLOCK,), -1, tl.int32), mask=at < end)
