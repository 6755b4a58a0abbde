"""The kernels' declarations, by group; `ALL` in the order in which they are documented."""

from moec.codegen.triton.specs import attention, exchange, gemm, grouped, heads, prefill, rope, routing, rows, sampling

ALL = (
    *gemm.SPECS,
    *grouped.SPECS,
    *attention.SPECS,
    *prefill.SPECS,
    *heads.SPECS,
    *rows.SPECS,
    *rope.SPECS,
    *routing.SPECS,
    *exchange.SPECS,
    *sampling.SPECS,
)
