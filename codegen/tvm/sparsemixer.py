"""Expert choice of sparsemixer at inference: one expert after the other (Liu et al. 2024, arXiv 2409.12136).

    sparsemixer(logits, ids, weights, tokens)

logits f32[tokens, experts]; ids i32[tokens, top_k], weights f32[tokens, top_k]. Each turn takes the best expert that is
left; its weight is its softmax among those left whose logit is near: (best - logit) / max(|logit|, best) <= 2 * jitter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Kernel, Machine, const, kernel_body
from moec.codegen.tvm.vector import Variable, exp, load, new_kernel, pointers, row, scalars


@dataclass(frozen=True)
class SparsemixerSpec:
    """As of `moe.route`."""

    experts: int
    top_k: int
    jitter: float
    normalise: bool
    scale: float


@cache
def build_sparsemixer(spec: SparsemixerSpec, machine: Machine) -> Kernel:
    """sparsemixer(logits, ids, weights, tokens), on the caller's core: there are few experts."""
    kernel = new_kernel("sparsemixer", spec)
    params = [*pointers("logits"), *pointers("ids", dtype="int32"), *pointers("weights"), *scalars("tokens")]
    with kernel_body(kernel, params) as (logits, ids, weights, tokens), T.serial(0, tokens) as t:
        x0, y0 = row(t, spec.experts), row(t, spec.top_k)
        total = Variable(1)
        for k in range(spec.top_k):
            weight = _choose(spec, logits, x0, ids, y0, k)
            T.buffer_store(weights, weight, [y0 + k])
            total.add(weight)
        for k in range(spec.top_k):
            value = weights[y0 + k]
            if spec.normalise:
                value = value / (total.value + const(1e-20, "float32"))
            T.buffer_store(weights, value * const(spec.scale, "float32"), [y0 + k])
    return kernel


def _choose(spec: SparsemixerSpec, logits: Any, x0: Any, ids: Any, y0: Any, k: int) -> Any:
    """Store the id of turn k and return its weight."""

    def left(e: Any) -> Any:
        taken: Any = const(True, "bool")
        for before in range(k):
            taken = T.And(taken, ids[y0 + before] != e)
        return taken

    best, where = Variable(1, -math.inf), Variable(1, 0, "int32")
    with T.serial(0, spec.experts) as e:
        value = load(logits, x0 + e, 1)
        better = T.Bind(T.And(left(e), value > best.value))
        where.set(T.Select(better, e, where.value))
        best.set(T.Select(better, value, best.value))
    T.buffer_store(ids, where.value, [y0 + k])
    top = T.Bind(best.value)
    total = Variable(1)
    with T.serial(0, spec.experts) as e:
        value = load(logits, x0 + e, 1)
        size = T.max(T.max(value, const(0.0, "float32") - value), top)
        near = (top - value) / size <= const(2 * spec.jitter, "float32")
        weight = exp(value - top, 1)
        total.add(T.Select(T.And(left(e), near), weight, const(0.0, "float32")))
    return T.Bind(const(1.0, "float32") / total.value)
