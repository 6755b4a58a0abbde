# mypy: ignore-errors
"""Which rows of A a block of a grouped product owns: one weight matrix for each expert, rows sorted by expert.

Two layouts of A. *Contiguous*: the experts' rows follow one another, each expert's padded to a multiple of ALIGN, and
`layout[block]` names the expert of a block of ALIGN rows (-1: nothing to do); ALIGN is a multiple of BM. *Masked*, with
ALIGN 0: expert e owns the rows from `e * capacity` on, and `layout[e]` counts those in use.
"""

import triton
import triton.language as tl


@triton.jit
def expert_block(layout_ptr, capacity, BM: tl.constexpr, ALIGN: tl.constexpr):
    """Expert, first row and rows in use (0 or less: none) of this program's block of BM rows."""
    block = tl.program_id(1)
    if ALIGN == 0:
        expert = tl.program_id(2)
        first = expert.to(tl.int64) * capacity + block * BM
        used = tl.load(layout_ptr + expert) - block * BM
    else:
        expert = tl.load(layout_ptr + block * BM // ALIGN)
        first = block.to(tl.int64) * BM
        used = tl.where(expert >= 0, BM, 0)
    return expert.to(tl.int64), first, used
