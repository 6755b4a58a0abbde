"""The lowering passes that kernels of plain loops, buffers and vectors need, registered with TVM as `NAME`.

TVM's default pipeline also serves scheduled blocks, software pipelines and GPU memory scopes; on long straight-line
kernels those passes cost several times what LLVM does. What they would simplify, LLVM simplifies.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.tirx import transform
from tvm.tirx.compilation_pipeline import register_tir_pipeline

NAME = "moec_cpu"


def _finalise() -> Any:
    return tvm.ir.transform.Sequential([transform.LowerTVMBuiltin(), transform.LowerIntrin()])


def _pipeline() -> tuple[Any, Any, Any]:
    lowering = tvm.ir.transform.Sequential(
        [
            transform.FlattenBuffer(),
            transform.VectorizeLoop(),
            transform.UnrollLoop(),
            transform.StmtSimplify(),
            tvm.s_tir.transform.RewriteUnsafeSelect(),
            transform.VerifyMemory(),
            transform.AnnotateEntryFunc(),
            transform.SplitHostDevice(),
            transform.MakePackedAPI(),
        ]
    )
    return lowering, _finalise, _finalise


register_tir_pipeline(NAME, _pipeline)
