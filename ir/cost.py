"""What an op computes and moves, with every symbol bound: the counts of the op table, without a machine's speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moec.ir.dims import Dim, Size, bind
from moec.ir.module import Op
from moec.ir.optable import OPS, operand_type


@dataclass(frozen=True)
class OpCost:
    """Floating-point operations (a multiply-add counts two) and bytes of one run of an op."""

    flops: int
    bytes_read: int
    bytes_written: int
    bytes_sent: int = 0

    def __str__(self) -> str:
        moved = f"{amount(self.bytes_read, 'B')} read, {amount(self.bytes_written, 'B')} written"
        sent = f", {amount(self.bytes_sent, 'B')} sent" if self.bytes_sent else ""
        return f"{amount(self.flops, 'FLOP')}, {moved}{sent}"


def phase_sizes(phase: str, batch: int, context: int, chunk: int, parts: int = 1) -> dict[str, int]:
    """Values of the symbols of an entry: decode steps every sequence by a token, prefill feeds a chunk of one.

    With several `parts`, the micro-batches, `T0`, `T1`, ... are the parts of `T`, as even as they go.
    """
    decode = phase == "decode"
    sequences, tokens = (batch, batch) if decode else (1, min(chunk, context))
    pages = -(-context // 64)
    total = sequences * context
    whole = {"T": tokens, "S": total, "B": sequences, "R": sequences}
    split = {f"{s}{k}": -(-(size - k) // parts) for s, size in whole.items() for k in range(parts if parts > 1 else 0)}
    return {**whole, "C": context, "N": pages, "P": sequences * pages, **split}


def op_cost(op: Op, sizes: Mapping[str, int]) -> OpCost:
    """Counts of `op`; a symbol that `sizes` lacks counts as the tokens `T`, or as those of its micro-batch."""
    types = [operand_type(o) for o in op.operands]
    results = [r.type for r in op.results]
    rule = OPS[op.name]

    def value(size: Size) -> int:
        unknown = size.symbols() - set(sizes) if isinstance(size, Dim) else frozenset()
        tokens = {s: sizes.get(f"T{s[len(s.rstrip('0123456789')) :]}", sizes["T"]) for s in unknown}
        return bind(size, {**sizes, **tokens})

    read = value(rule.bytes_read(types, results, op.attrs))
    written = value(rule.bytes_written(types, results, op.attrs))
    sent = value(rule.bytes_sent(types, results, op.attrs))
    return OpCost(value(rule.flops(types, results, op.attrs)), read, written, sent)


def amount(count: float, unit: str) -> str:
    """`1.23 GB` for 1230000000 and `B`."""
    prefixes = iter(("", "k", "M", "G", "T"))
    prefix = next(prefixes)
    while count >= 1000 and prefix != "T":
        count, prefix = count / 1000, next(prefixes)
    return f"{count:.3g} {prefix}{unit}"
