"""Evaluates a module before and after each pass, on every rank of its mesh, and judges what moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from moec.errors import InputError
from moec.ir import Function, Module, Op, TensorType, print_function, print_module, print_op
from moec.ir.evaluate import EvaluationError, Evaluator, WeightPrograms
from moec.ir.issue import entries
from moec.ir.mesh import Mesh, mesh_of
from moec.ir.spmd import Peers, run_ranks
from moec.ir.stats import parameters
from moec.passes.numerics.compare import LEAST, OP, ROUNDING, ROW, Departure, distance, first, hidden, worst_row
from moec.passes.numerics.instance import Inputs, Loader, chunks
from moec.passes.numerics.run import Routing, Run

MOST_PARAMETERS = 40_000_000
MOST_RANKS = 16


class TooLarge(InputError):
    """A model whose reference evaluation would take too long."""

    template: ClassVar[str] = (
        "--verify numerics evaluates the whole model in float64 and takes at most {limit} M parameters, {model} has "
        "{count} M: shrink it, for example --set num_hidden_layers=2 --set hidden_size=256 --set n_routed_experts=8"
    )


class TooManyRanks(InputError):
    """A mesh of which not every rank can be evaluated."""

    template: ClassVar[str] = (
        "--verify numerics evaluates every rank and takes at most {limit}, the mesh has {ranks}: "
        "choose --ranks {limit} or fewer"
    )


class Numerics:
    """Holds the results of a module; `check` compares those of the same module after a pass."""

    def __init__(self, module: Module, context: int) -> None:
        count = parameters(module)
        if count > MOST_PARAMETERS:
            raise TooLarge(limit=MOST_PARAMETERS // 10**6, model=module.name, count=count // 10**6)
        self._loader = Loader()
        self._chunks = list(chunks(context))
        self._programs: dict[str, str] = {}
        self._weights: dict[int, WeightPrograms] = {}
        """What made the weights of the last evaluation, and those themselves, by rank."""
        self.moved = 0.0
        """Relative change of the results by the last pass checked."""
        self._text = print_module(module)
        self._before = self._trace(module)

    def check(self, module: Module, tolerance: float) -> Departure | None:
        """How far the module's results are from those of the last call, when that is beyond `tolerance`."""
        text = print_module(module)
        if text == self._text:
            self.moved = 0.0
            return None
        self._text = text
        try:
            before = self._before
            after = self._trace(module, before if tolerance >= ROUNDING else None)
        except EvaluationError as error:
            return Departure(float("inf"), str(error))
        # Later passes are compared with the module as it routes by itself.
        self._before = self._trace(module) if after.nudged else after
        bound = max(tolerance, LEAST)
        pairs = [(before.results[k], after.results.get(k)) for k in before.results]
        # Other ranks score other tokens.
        if len(before.ranks) == len(after.ranks):
            both = [(scores, after.scores[k]) for k, scores in before.scores.items() if k in after.scores]
            pairs += [(a, b) for a, b in both if a.shape == b.shape]
        self.moved = worst = max((distance(a, b) for a, b in pairs), default=0.0)
        # A whole tensor hides a few wrong tokens: each may move by some tolerances only.
        token = max((worst_row(a, b) for a, b in pairs), default=0.0) / ROW
        if max(worst, token) <= bound:
            return hidden(before, after, OP * bound) if tolerance >= ROUNDING else None
        return Departure(max(worst, token), first(before, after, bound))

    def _trace(self, module: Module, like: Run | None = None) -> Run:
        mesh = mesh_of(module)
        if mesh.ranks > MOST_RANKS:
            raise TooManyRanks(ranks=mesh.ranks, limit=MOST_RANKS)
        programs = {n: f"{module.attrs}{w.indices}{print_function(w.program)}" for n, w in module.weights.items()}
        same = {n for n, text in programs.items() if self._programs.get(n) == text}
        self._programs = programs
        # Products are too small to share, and ranks are threads of their own: more would only wait for each other.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if mesh.ranks == 1:
                return self._rank(module, mesh, 0, None, like, same)
            runs = run_ranks(mesh, lambda rank, peers: self._rank(module, mesh, rank, peers, like, same))
            return _assemble(mesh, runs)
        finally:
            torch.set_num_threads(threads)

    def _rank(
        self, module: Module, mesh: Mesh, rank: int, peers: Peers | None, like: Run | None, same: set[str]
    ) -> Run:
        """Evaluate every entry that the rank runs, with its data-parallel share of the sequences.

        `like` is the run whose routing is followed; the weights `same` are those of the last evaluation.
        """
        run = Run()
        weights = WeightPrograms(module, self._loader, rank)
        if rank in self._weights:
            weights.take_over(self._weights[rank], same)
        self._weights[rank] = weights
        stage, share = mesh.index(rank, "pp"), (mesh.index(rank, "dp"), mesh.dp)
        for function in entries(module):
            if function.attrs.get("stage", stage) != stage:
                continue
            name = function.name.removesuffix(f".{function.attrs.get('stage')}")
            inputs = Inputs(function, share)
            evaluator = _Routed(module, weights, run, like.of_rank(rank, mesh.ranks) if like else None, peers)
            for number, tokens in enumerate(self._chunks):
                outputs = evaluator.call(function, inputs.chunk(tokens))
                for i, y in enumerate(inputs.joined(outputs)):
                    run.results[name, number, i] = y
                    run.rows[name, number, i] = inputs.taken
            for i, cache in enumerate(inputs.caches.values()):
                run.results[name, len(self._chunks), i] = cache
        return run


def _assemble(mesh: Mesh, ranks: list[Run]) -> Run:
    """The run of the whole mesh: rows of all replicas, cache pages of all replicas and stages; steps of rank 0.

    Raises EvaluationError where ranks that must agree do not.
    """
    out = Run()
    out.steps, out.scores, out.ranks = ranks[0].steps, ranks[0].scores, ranks
    out.nudged = any(run.nudged for run in ranks)
    firsts = [rank for rank in range(mesh.ranks) if mesh.index(rank, "tp") == 0]
    for key, one in ranks[0].results.items():
        if key not in ranks[0].rows:
            parts = [
                torch.stack([ranks[r].results[key] for r in range(mesh.ranks) if mesh.index(r, "tp") == i]).sum(0)
                for i in range(mesh.tp)
            ]
            out.results[key] = _whole_cache(parts)
            continue
        total = sum(len(ranks[r].rows[key]) for r in firsts if mesh.index(r, "pp") == 0)
        whole = torch.full((total, *one.shape[1:]), float("nan"), dtype=one.dtype)
        for rank, run in enumerate(ranks):
            rows, y = run.rows[key], run.results[key]
            if mesh.index(rank, "tp") == 0 and mesh.index(rank, "pp") == 0:
                whole[rows] = y
            elif distance(whole[rows], y) > LEAST:
                where = f"rank {rank} of {mesh.ranks}"
                raise EvaluationError(function=key[0], op=where, reason="its results differ from its group's")
        out.results[key] = whole
    return out


def _whole_cache(parts: list[torch.Tensor]) -> torch.Tensor:
    """The cache of a tensor-parallel group: the same on all ranks, or heads of each, keys before values in a row."""
    different = [part for i, part in enumerate(parts) if i == 0 or not torch.equal(part, parts[i - 1])]
    if len(different) == 1:
        return parts[0]
    return torch.cat([torch.cat(halves, -1) for halves in zip(*(p.chunk(2, -1) for p in different), strict=True)], -1)


class _Routed(Evaluator):
    """Routes tokens as the run before a pass did where the pass moved scores enough to explain the difference.

    A choice counts as that of the run before when the router makes it too once the scores of its experts are raised,
    and all others lowered, by what the token's scores moved at most; otherwise the token keeps its own experts, and
    its results tell. How far scores moved is judged apart.
    """

    def __init__(
        self, module: Module, weights: WeightPrograms, run: Run, like: Run | None, peers: Peers | None
    ) -> None:
        super().__init__(module, weights, torch.float64, rounding=False, trace=self._note, peers=peers)
        self._into, self._like = run, like
        self._sizes: dict[str, int] = {}
        """Values of the symbols in the running call of a function."""

    def call(self, function: Function, args: Sequence[Any]) -> list[Any]:
        """As the evaluator's; raises EvaluationError where a value has another shape than its type says."""
        outside, self._sizes = self._sizes, {}
        try:
            return super().call(function, args)
        finally:
            self._sizes = outside

    def _note(self, function: Function, op: Op, results: list[Any]) -> None:
        if op.name == "comm.dispatch":
            # How many rows arrive is known anew with every dispatch: of two layers in a function each has its own.
            self._sizes.pop(str(op.attrs["rows"]), None)
        for value, made in zip(op.results, results, strict=True):
            # What an exchange hands to the one behind it is no tensor.
            if not isinstance(value.type, TensorType) or not isinstance(made, torch.Tensor):
                continue
            if not self._fits(value.type, made.shape):
                sizes = ", ".join(f"{name} = {size}" for name, size in self._sizes.items())
                reason = f"%{value.name} has the shape {list(made.shape)} where {sizes}"
                raise EvaluationError(function=function.name, op=print_op(op), reason=reason)
        self._into.note(function, op, results)

    def _fits(self, type: TensorType, shape: Sequence[int]) -> bool:
        """Whether dims are what the type says; a symbol stands for the first size that it is seen with."""
        if len(type.shape) != len(shape):
            return False
        for d, size in zip(type.shape, shape, strict=True):
            # Expressions over symbols follow from these.
            known = d if isinstance(d, int) else self._sizes.setdefault(str(d), size)
            if known != size:
                return False
        return True

    def _run(self, op: Op, inputs: list[Any]) -> list[Any]:
        results = super()._run(op, inputs)
        if op.name == "moe.route":
            x, gate, *_ = inputs
            logits = x @ gate.T
            routing = self._into.routing(op)
            if self._like is not None and routing in self._like.scores:
                self._follow(op, inputs, logits, routing, results)
            self._into.scores[routing], self._into.routed[routing] = logits, results[0]
        return results

    def _follow(self, op: Op, inputs: list[Any], logits: torch.Tensor, routing: Routing, results: list[Any]) -> None:
        assert self._like is not None
        before, wanted = self._like.scores[routing], self._like.routed[routing]
        if before.shape != logits.shape or wanted.shape != results[0].shape:
            return
        x, gate, *bias = inputs
        score = torch.sigmoid if op.attrs["score"] == "sigmoid" else (lambda y: y.softmax(-1))
        moved = (score(logits) - score(before)).abs().amax(-1) * 1.001
        chosen = torch.zeros(len(x), len(gate), dtype=torch.bool).scatter_(1, wanted.long(), True)
        for t in range(len(x)):
            if set(results[0][t].tolist()) == set(wanted[t].tolist()):
                continue
            nudge = torch.where(chosen[t], moved[t], -moved[t])
            nudged = super()._run(op, [x[t : t + 1], gate, bias[0] + nudge if bias else nudge])
            if set(nudged[0][0].tolist()) == set(wanted[t].tolist()):
                self._into.nudged = True
                for result, made in zip(results, nudged, strict=True):
                    result[t] = made[0]
