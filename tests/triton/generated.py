"""Generated kernels of whole programs, checked one by one by worker.py in the interpreter."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from small_families import FAMILIES

import moec
from moec.codegen.triton.fused.check import symbols
from moec.codegen.triton.fused.products import Product, Store, SwiGlu, product_kernel
from moec.codegen.triton.lower.table import KernelTable
from moec.codegen.triton.problem import Problem, check
from moec.codegen.triton.program import Program, lower_module
from moec.ir import Op, TensorType, Value, WeightRef
from moec.ir.expr import evaluate
from moec.ir.types import Quant
from moec.targets import load as load_target

SMALL = {"num_hidden_layers": "2", "first_k_dense_replace": "1", "n_routed_experts": "4", "n_group": "2",
         "topk_group": "1", "num_experts_per_tok": "2"}  # fmt: skip


HEADS_OF_128 = {"qk_nope_head_dim": "128", "v_head_dim": "128"}
"""Rows of a head follow scale blocks: plain and absorbed attention share the up-projection."""
TINY = "tiny-deepseek-v3"


@functools.lru_cache(maxsize=16)
def program(target: str, recipe: str, shared: bool = False, model: str = TINY) -> Program:
    """The two phases of a small model; `shared` with heads of 128, a plain prefill and an absorbed decode."""
    settings = {**SMALL, **HEADS_OF_128} if shared else FAMILIES.get(model, SMALL)
    passes = ["mla-absorb{prefill=plain,decode=absorbed,fold=never}"] if shared else []
    plan = moec.trace(model, settings).optimize(target, batch=4, context=256, recipe=recipe, passes=passes)
    return lower_module(plan.ir, plan.context.target, vars(plan.context.limits))


def generated_names(target: str, recipe: str, shared: bool = False, model: str = TINY) -> list[str]:
    """The kernels that were written for the program."""
    return [n for n, e in program(target, recipe, shared, model).table.entries.items() if e.instance.spec.source]


def wide_names(target: str, recipe: str, model: str) -> list[str]:
    """Products of BF16 rows with float32 weights."""
    kernels = {
        n: e.instance.spec.build.keywords["kernel"]  # type: ignore[attr-defined]
        for n, e in program(target, recipe, model=model).table.entries.items()
        if e.instance.spec.source
    }
    return [
        n
        for n, k in kernels.items()
        if k.product and k.product.wide and k.product.a.type.dtype != k.product.b.type.dtype
    ]


def masked_error(fp8: bool, pair: bool, load: int, bulk: bool) -> dict[str, Any]:
    """The worst errors of experts in the masked layout: 3 of 40 rows each, gate, up, SwiGLU and quantisation or not."""
    rows, n, k = 120, 256, 192
    scales = Quant("f32", (128, 128)), Quant("f32", (1, 128))
    kind = "fp8_e4m3" if fp8 else "bf16"
    weight = WeightRef("w", (), TensorType(kind, (3, n, k), scales[0] if fp8 else None))
    x = Value("x", TensorType(kind, (rows, k), scales[1] if fp8 else None))
    y = Value(
        "y", TensorType(kind if pair else "bf16", (rows, n // 2 if pair else n), scales[1] if fp8 and pair else None)
    )
    made = Product(x, weight, "grouped", (*([SwiGlu()] if pair else []), Store(y)), masked=True)
    kernel = product_kernel(made, "masked", [Op("moe.experts", [x, weight], {}, [y])], str(rows))
    sizes = {"ROWS": rows, "T": rows, "CAPACITY": 40, "ALIGN": 0, "LOAD": load}
    instance = KernelTable(load_target("h800"), {}).generated(kernel, "decode", made, **sizes)
    constants = {**instance.tile.constants, "TMA": int(bulk)}
    instance = replace(instance, tile=replace(instance.tile, constants=constants))
    return check(Problem(instance, torch.Generator().manual_seed(load), "cpu"))


def bulk_names(target: str, recipe: str) -> list[str]:
    """The products whose operands tensor descriptors can name."""
    table = program(target, recipe).table.entries
    return [n for n in generated_names(target, recipe) if table[n].instance.spec.boxes]


def generated_error(
    target: str, recipe: str, name: str, tokens: int, load: int = 0, seed: int = 0, shared: bool = False,
    model: str = TINY, turned: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The worst errors of one kernel, as shares of their bounds; `turned`: in the form that was not chosen."""
    instance = program(target, recipe, shared, model).table.entries[name].instance
    if turned:
        constants = {**instance.tile.constants, "TMA": 1 - instance.tile.constants["TMA"]}
        instance = replace(instance, tile=replace(instance.tile, constants=constants))
    kernel = instance.spec.build.keywords["kernel"]  # type: ignore[attr-defined]
    rows = evaluate(kernel.rows, symbols(tokens))
    instance = replace(instance, dims={**instance.dims, "T": tokens, "ROWS": rows, "LOAD": load})
    return check(Problem(instance, torch.Generator().manual_seed(seed), "cpu"))
