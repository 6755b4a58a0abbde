"""What is known of the GPU kernel: it drives its test, compilation, launch and documentation."""

from __future__ import annotations

from typing import Any

from moec.codegen.triton.problem import Expected, Problem
from moec.codegen.triton.spec import Case, KernelSpec, Tile, Use, on
from moec.codegen.triton.specs.recipe import BF16_ROUNDING, EVERYWHERE
from moec.ir import Op, TensorType

LIMIT = 1.5


def _build(p: Problem) -> dict[str, Any]:
    x = p.put("x_ptr", p.normal(p.M, 2 * p.INNER))
    return {"x_ptr": x, "y_ptr": p.output("y_ptr", p.M, p.INNER), "limit": LIMIT, "INNER": p.INNER}


def _reference(p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    import torch

    gate, up = x["x_ptr"].double().chunk(2, -1)
    y = torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
    return {"y_ptr": Expected(y, 1.001 * BF16_ROUNDING, 1e-7)}


def _serve(op: Op) -> Use:
    """The arguments and sizes for `swiglu.limited` in a program."""
    x, y = op.operands[0], op.result
    assert isinstance(y.type, TensorType)
    tokens, inner = y.type.shape
    assert isinstance(inner, int)
    limit = op.attrs["limit"]
    assert isinstance(limit, float)
    arguments = {"x_ptr": x, "y_ptr": y, "limit": limit, "INNER": inner}
    return Use(arguments, {"M": str(tokens), "INNER": inner})


SPEC = KernelSpec(
    name="swiglu_limited",
    function="moec_limited.gpu_kernel:swiglu_limited",
    ops=("swiglu.limited",),
    summary="SwiGLU with bounded inputs in BF16",
    signature={"x_ptr": "*bf16", "y_ptr": "*bf16", "limit": "fp32", "INNER": "i32"},
    dims={"M": 128, "INNER": 2048},
    constants=lambda dims: {},
    tiles=on(EVERYWHERE, any=Tile({"BLOCK": 1024}, 4, 1)),
    grid=("M", "ceildiv(INNER, BLOCK)"),
    build=_build,
    reference=_reference,
    cases=(Case("7 rows", {"M": 7, "INNER": 2048}), Case("one row, ragged", {"M": 1, "INNER": 176})),
    flops="8*M*INNER",
    bytes="6*M*INNER",
    aligned=("INNER",),
    requires=("INNER % 16 == 0",),
    serve=_serve,
)
