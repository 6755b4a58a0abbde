"""The kernels' declarations, by group; `ALL` in the order in which they are documented."""

from moec.codegen.triton.specs import attention, exchange, heads, indexer, permutation, prefill, routing, sampling

ALL = (
    *attention.SPECS,
    *prefill.SPECS,
    *heads.SPECS,
    *indexer.SPECS,
    *routing.SPECS,
    *permutation.SPECS,
    *exchange.SPECS,
    *sampling.SPECS,
)
