"""Generated kernels of whole programs, checked one by one by worker.py in the interpreter."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from small_families import FAMILIES

import moec
from moec.codegen.triton.fused.check import symbols
from moec.codegen.triton.problem import Problem, check
from moec.codegen.triton.program import Program, lower_module
from moec.ir.expr import evaluate

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
