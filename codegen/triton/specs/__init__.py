"""The kernels' declarations, by group; `ALL` in the order in which they are documented."""

from moec.codegen.triton.specs import attention, gemm, grouped, rope, routing, rows, sampling

ALL = (*gemm.SPECS, *grouped.SPECS, *attention.SPECS, *rows.SPECS, *rope.SPECS, *routing.SPECS, *sampling.SPECS)
