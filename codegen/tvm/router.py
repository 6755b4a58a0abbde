"""Expert choice of a token-choice gate.

    moe_route(logits, bias, ids, weights, scratch, tokens)      with a selection bias f32[experts]
    moe_route(logits, ids, weights, scratch, tokens)            without

logits f32[tokens, experts] of row stride `ld`; ids i32[tokens, top_k] and weights f32[tokens, top_k], densely, ordered
by falling choice score, equal scores by rising id. scratch f32[scratch_elements(spec, machine)].

    scores  = sigmoid(logits) or softmax(logits)
    choice  = scores + bias
    groups  of experts / groups consecutive experts, ranked by the sum of their two best choices ("top2sum") or by their
            best ("max"); only experts of the best `top_groups` groups compete
    ids     = the top_k best choices
    weights = scores[ids], divided by (their sum + 1e-20) if `normalise`, times `scale`

Ids are always distinct and in range, for any logits. Sources: DeepSeek-V3, arXiv 2412.19437, sec. 2.1.2 (sigmoid, bias,
top-2 sums); DeepSeek-V2, arXiv 2405.04434, sec. 2.2.2 (softmax, group maxima).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Kernel, Machine, const, kernel_body
from moec.codegen.tvm.vector import (
    KernelSpecError,
    Variable,
    argmax_row,
    exp,
    fill,
    foreach,
    load,
    max_lanes,
    new_kernel,
    pointers,
    row,
    scalars,
    sigmoid,
    spread,
    store,
    sum_lanes,
)

_MASKED = -3.0e38  # below every choice score, above the mark of an expert that is already chosen
_CHOSEN = -math.inf
_WORK = 1 << 12  # expert scores from which the other cores help


@dataclass(frozen=True)
class RouterSpec:
    """`score`: "sigmoid" or "softmax"; `group_score`: "top2sum" or "max", without effect for one group."""

    experts: int
    top_k: int
    score: str
    has_bias: bool
    groups: int
    top_groups: int
    group_score: str
    normalise: bool
    scale: float
    max_tokens: int
    ld: int

    def __post_init__(self) -> None:
        if self.experts % self.groups:
            self._refuse(f"do not divide into {self.groups} groups")
        if not 1 <= self.top_groups <= self.groups:
            self._refuse(f"with {self.top_groups} of {self.groups} groups to choose")
        if not 1 <= self.top_k <= self.top_groups * self.group_size:
            self._refuse(f"with {self.top_k} to choose of {self.top_groups * self.group_size} in the best groups")
        if self.limited and self.group_score == "top2sum" and self.group_size < 2:
            self._refuse("in groups of one have no two best")
        if self.score not in ("sigmoid", "softmax") or self.group_score not in ("top2sum", "max"):
            self._refuse(f"with unknown score {self.score!r} or group score {self.group_score!r}")

    def _refuse(self, problem: str) -> None:
        raise KernelSpecError(kernel="router", problem=f"{self.experts} experts {problem}")

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.experts // self.groups

    @property
    def limited(self) -> bool:
        """Whether some group is left out."""
        return self.top_groups < self.groups


def _worker_elements(spec: RouterSpec) -> int:
    return -(-(2 * spec.experts + 2 * spec.groups) // 16) * 16


def scratch_elements(spec: RouterSpec, machine: Machine) -> int:
    """fp32 elements of scratch memory."""
    return machine.cores * _worker_elements(spec)


class _Token:
    """Emits the routing of one token; scores, choices and group scores lie in the worker's scratch memory."""

    def __init__(self, spec: RouterSpec, machine: Machine, scratch: Any, worker: Any) -> None:
        self.spec, self.lanes, self.scratch = spec, machine.lanes, scratch
        self.scores = T.Bind(worker * _worker_elements(spec))
        self.choices = T.Bind(self.scores + spec.experts)
        self.group_scores = T.Bind(self.choices + spec.experts)
        self.open_groups = T.Bind(self.group_scores + spec.groups)

    def put(self, value: Any, at: Any) -> None:
        T.buffer_store(self.scratch, value, [at])

    def sigmoid_scores(self, logits: Any, x0: Any) -> None:
        def score(i: Any, width: int) -> None:
            store(self.scratch, sigmoid(load(logits, x0 + i, width), width), self.scores + i, width)

        foreach(self.spec.experts, self.lanes, score)

    def softmax_scores(self, logits: Any, x0: Any) -> None:
        widths = (self.lanes, 1)
        top = {w: Variable(w, -math.inf) for w in widths}
        total = {w: Variable(w) for w in widths}

        def find_top(i: Any, width: int) -> None:
            top[width].set(T.max(load(logits, x0 + i, width), top[width].value))

        foreach(self.spec.experts, self.lanes, find_top)
        largest = T.Bind(T.max(max_lanes(top[self.lanes].value, self.lanes), top[1].value))

        def exponential(i: Any, width: int) -> None:
            value = exp(load(logits, x0 + i, width) - spread(largest, width), width)
            store(self.scratch, value, self.scores + i, width)
            total[width].add(value)

        foreach(self.spec.experts, self.lanes, exponential)
        inverse = T.Bind(const(1.0, "float32") / (sum_lanes(total[self.lanes].value, self.lanes) + total[1].value))

        def normalise(i: Any, width: int) -> None:
            at = self.scores + i
            store(self.scratch, load(self.scratch, at, width) * spread(inverse, width), at, width)

        foreach(self.spec.experts, self.lanes, normalise)

    def bias_choices(self, bias: Any | None) -> None:
        def choice(i: Any, width: int) -> None:
            value = load(self.scratch, self.scores + i, width)
            if bias is not None:
                value = T.Bind(value + load(bias, i, width))
            # A score that is not a number competes as the last one.
            value = T.Select(value == value, value, fill(_MASKED, width))
            store(self.scratch, value, self.choices + i, width)

        foreach(self.spec.experts, self.lanes, choice)

    def mask_groups(self) -> None:
        spec = self.spec
        with T.serial(0, spec.groups) as g:
            start = T.Bind(self.choices + g * spec.group_size)
            best, second = Variable(1, _MASKED), Variable(1, _MASKED)
            with T.serial(0, spec.group_size) as i:
                value = load(self.scratch, start + i, 1)
                second.set(T.max(second.value, T.min(best.value, value)))
                best.set(T.max(best.value, value))
            total = best.value + second.value if spec.group_score == "top2sum" else best.value
            self.put(T.max(total, const(_MASKED, "float32")), self.group_scores + g)
            self.put(const(0.0, "float32"), self.open_groups + g)
        with T.serial(0, spec.top_groups):
            _, group = argmax_row(self.scratch, self.group_scores, spec.groups, self.lanes)
            self.put(const(_CHOSEN, "float32"), self.group_scores + group)
            self.put(const(1.0, "float32"), self.open_groups + group)
        with T.serial(0, spec.experts) as e:
            closed = self.scratch[self.open_groups + e // spec.group_size] == const(0.0, "float32")
            choice = load(self.scratch, self.choices + e, 1)
            self.put(T.Select(closed, const(_MASKED, "float32"), choice), self.choices + e)

    def choose(self, ids: Any, weights: Any, token: Any) -> None:
        spec = self.spec
        first = row(token, spec.top_k)
        total = Variable(1)
        with T.serial(0, spec.top_k) as k:
            _, expert = argmax_row(self.scratch, self.choices, spec.experts, self.lanes)
            weight = load(self.scratch, self.scores + expert, 1)
            self.put(const(_CHOSEN, "float32"), self.choices + expert)
            T.buffer_store(ids, expert, [first + k])
            T.buffer_store(weights, weight, [first + k])
            total.add(weight)
        factor: Any = const(spec.scale, "float32")
        with T.serial(0, spec.top_k) as k:
            weight = weights[first + k]
            if spec.normalise:
                weight = weight / (total.value + const(1e-20, "float32"))
            T.buffer_store(weights, weight * factor, [first + k])


def build_moe_route(spec: RouterSpec, machine: Machine) -> Kernel:
    """moe_route(logits, [bias,] ids, weights, scratch, tokens)."""
    kernel = new_kernel("moe_route", spec)
    params = [
        *pointers("logits", *(["bias"] if spec.has_bias else [])),
        *pointers("ids", dtype="int32"),
        *pointers("weights", "scratch"),
        *scalars("tokens"),
    ]
    with kernel_body(kernel, params) as args:
        logits, bias = args[0], args[1] if spec.has_bias else None
        ids, weights, scratch, tokens = args[-4:]

        def route(worker: Any, workers: Any) -> None:
            with T.serial(0, (tokens - worker + workers - 1) // workers) as i:
                t = T.Bind(worker + i * workers)
                token = _Token(spec, machine, scratch, worker)
                score = token.sigmoid_scores if spec.score == "sigmoid" else token.softmax_scores
                score(logits, row(t, spec.ld))
                token.bias_choices(bias)
                if spec.limited:
                    token.mask_groups()
                token.choose(ids, weights, t)

        if machine.cores == 1 or spec.max_tokens * spec.experts < _WORK:
            route(const(0), 1)
        else:
            workers = T.Bind(T.Select(tokens * spec.experts < _WORK, const(1), const(machine.cores)))
            with T.parallel(0, machine.cores) as w, T.If(w < workers), T.Then():
                route(w, workers)
    return kernel
