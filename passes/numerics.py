"""Numbers in the loop: a module is evaluated on small inputs before and after every pass, in float64.

The inputs bind every symbol to a small number: two sequences, fed in chunks over a cache of small pages, so that a
chunk attends over a cached prefix and pages are crossed. Weights are random, a function of the tensor's name, and go
through the weight programs. Rounding to stated element types is left out, so that a pass that only re-orders must agree
to rounding of float64, and one that rounds weights shows that rounding alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moec.errors import InputError
from moec.ir import CacheType, Function, IndexType, Module, Op, TensorType, print_op
from moec.ir.evaluate import EvaluationError, Evaluator, WeightPrograms
from moec.ir.issue import CALLS
from moec.ir.mesh import Mesh, mesh_of
from moec.ir.numeric import TORCH
from moec.ir.spmd import Peers, run_ranks
from moec.ir.stats import parameters

LEAST = 1e-9
"""Departure that a pass of tolerance 0 may show: the order of float64 sums."""
ROUNDING = 1e-3
"""Tolerances from here on admit rounded weights, by which a token's experts may change where scores are close."""
ROW = 2
"""Tolerances that the token that moves most may move by."""
OP = 3.5
"""Tolerances that a row of any op may move by: what residual sums hide behind it."""
MOST_PARAMETERS = 40_000_000
MOST_RANKS = 16
PAGE = 4
CHUNKS = ((5, 3), (2, 4), (1, 1), (2, 2))
"""Tokens of each of two sequences in each call: a prompt, a further chunk, one token each, several tokens each."""


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


@dataclass(frozen=True)
class Departure:
    """By how much results moved (relative to their norm), and the first op whose value did or that fails."""

    relative: float
    where: str

    def __str__(self) -> str:
        return f"results depart by {self.relative:.2g} (relative); {self.where}"


class Numerics:
    """Holds the results of a module; `check` compares those of the same module after a pass."""

    def __init__(self, module: Module, context: int) -> None:
        count = parameters(module)
        if count > MOST_PARAMETERS:
            raise TooLarge(limit=MOST_PARAMETERS // 10**6, model=module.name, count=count // 10**6)
        self._loader = _Loader()
        self._chunks = list(_chunks(context))
        self.moved = 0.0
        """Relative change of the results by the last pass checked."""
        self._before = self._trace(module)

    def check(self, module: Module, tolerance: float) -> Departure | None:
        """How far the module's results are from those of the last call, when that is beyond `tolerance`."""
        try:
            before = self._before
            after = self._trace(module, before if tolerance >= ROUNDING else None)
        except EvaluationError as error:
            return Departure(float("inf"), str(error))
        # Later passes are compared with the module as it routes by itself.
        self._before = self._trace(module) if after.nudged else after
        bound = max(tolerance, LEAST)
        pairs = [(before.results[k], after.results.get(k)) for k in before.results]
        # Scores of other ranks, or of micro-batches in their own order, are not those of the same tokens.
        if len(before.ranks) == len(after.ranks) and len(before.scores) == len(after.scores):
            pairs += [(a, b) for a, b in zip(before.scores, after.scores, strict=True) if a.shape == b.shape]
        self.moved = worst = max((_distance(a, b) for a, b in pairs), default=0.0)
        # A whole tensor hides a few wrong tokens: each may move by some tolerances only.
        token = max((_worst_row(a, b) for a, b in pairs), default=0.0) / ROW
        if max(worst, token) <= bound:
            return _hidden(before, after, OP * bound) if tolerance >= ROUNDING else None
        return Departure(max(worst, token), _first(before, after, bound))

    def _trace(self, module: Module, like: _Run | None = None) -> _Run:
        mesh = mesh_of(module)
        if mesh.ranks == 1:
            return self._rank(module, mesh, 0, None, like)
        if mesh.ranks > MOST_RANKS:
            raise TooManyRanks(ranks=mesh.ranks, limit=MOST_RANKS)
        return _assemble(mesh, run_ranks(mesh, lambda rank, peers: self._rank(module, mesh, rank, peers, like)))

    def _rank(self, module: Module, mesh: Mesh, rank: int, peers: Peers | None, like: _Run | None) -> _Run:
        """Evaluate every entry that the rank runs, with its data-parallel share of the sequences."""
        run = _Run()
        weights = WeightPrograms(module, self._loader, rank)
        called = {str(op.attrs["func"]) for _, op in module.ops() if op.name in CALLS}
        stage, share = mesh.index(rank, "pp"), (mesh.index(rank, "dp"), mesh.dp)
        for function in module.functions.values():
            if function.name in called or function.attrs.get("stage", stage) != stage:
                continue
            name = function.name.removesuffix(f".{function.attrs.get('stage')}")
            inputs = _Inputs(function, share)
            evaluator = _Routed(module, weights, run, like.of_rank(rank, mesh.ranks) if like else None, peers)
            for number, tokens in enumerate(self._chunks):
                outputs = evaluator.call(function, inputs.chunk(tokens))
                for i, y in enumerate(inputs.joined(outputs)):
                    run.results[name, number, i] = y
                    run.rows[name, number, i] = inputs.taken
            for i, cache in enumerate(inputs.caches.values()):
                run.results[name, len(self._chunks), i] = cache
        return run


def _assemble(mesh: Mesh, ranks: list[_Run]) -> _Run:
    """The run of the whole mesh: rows of all replicas, cache pages of all replicas and stages; steps of rank 0.

    Raises EvaluationError where ranks that must agree do not.
    """
    out = _Run()
    out.steps, out.scores, out.ranks = ranks[0].steps, ranks[0].scores, ranks
    out.nudged = any(run.nudged for run in ranks)
    firsts = [rank for rank in range(mesh.ranks) if mesh.index(rank, "tp") == 0]
    for key, first in ranks[0].results.items():
        if key not in ranks[0].rows:
            out.results[key] = torch.stack([ranks[rank].results[key] for rank in firsts]).sum(0)
            continue
        total = sum(len(ranks[r].rows[key]) for r in firsts if mesh.index(r, "pp") == 0)
        whole = torch.full((total, *first.shape[1:]), float("nan"), dtype=first.dtype)
        for rank, run in enumerate(ranks):
            rows, y = run.rows[key], run.results[key]
            if mesh.index(rank, "tp") == 0 and mesh.index(rank, "pp") == 0:
                whole[rows] = y
            elif _distance(whole[rows], y) > LEAST:
                where = f"rank {rank} of {mesh.ranks}"
                raise EvaluationError(function=key[0], op=where, reason="its results differ from its group's")
        out.results[key] = whole
    return out


class _Routed(Evaluator):
    """Routes tokens as the run before a pass did where the pass moved scores enough to explain the difference.

    A choice counts as that of the run before when the router makes it too once the scores of its experts are raised,
    and all others lowered, by what the token's scores moved at most; otherwise the token keeps its own experts, and
    its results tell. How far scores moved is judged apart.
    """

    def __init__(
        self, module: Module, weights: WeightPrograms, run: _Run, like: _Run | None, peers: Peers | None
    ) -> None:
        super().__init__(module, weights, torch.float64, rounding=False, trace=run.note, peers=peers)
        self._into, self._like = run, like

    def _run(self, op: Op, inputs: list[Any]) -> list[Any]:
        results = super()._run(op, inputs)
        if op.name == "moe.route":
            x, gate, *_ = inputs
            logits = x @ gate.T
            number = len(self._into.scores)
            if self._like is not None and number < len(self._like.scores):
                self._follow(op, inputs, logits, number, results)
            self._into.scores.append(logits)
            self._into.routed.append(results[0])
        return results

    def _follow(self, op: Op, inputs: list[Any], logits: torch.Tensor, number: int, results: list[Any]) -> None:
        assert self._like is not None
        before, wanted = self._like.scores[number], self._like.routed[number]
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


class _Loader:
    """Random tensors by name: norms near 1, matrices of unit output variance, biases that change what is chosen."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        if (name, shape) not in self._made:
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            x = torch.randn(shape, generator=generator)
            if name.endswith(("_scale_inv", "_scale")):
                x = torch.exp2(torch.floor(x) - 6)
            elif len(shape) == 1:
                x = 1 + 0.3 * x if "norm" in name else 0.3 * x
            elif "embed" not in name:
                x *= shape[-1] ** -0.5
            self._made[name, shape] = x.to(TORCH[dtype])
        return self._made[name, shape]


def _chunks(context: int) -> Iterator[tuple[int, ...]]:
    used = [0, 0]
    for tokens in CHUNKS:
        used = [u + t for u, t in zip(used, tokens, strict=True)]
        if max(used) > context:
            return
        yield tokens


class _Inputs:
    """Arguments of an entry function, call by call; caches stay and fill."""

    def __init__(self, function: Function, share: tuple[int, int] = (0, 1)) -> None:
        """`share` is (replica, replicas): sequence b belongs to replica b mod replicas."""
        self.function = function
        self.share = share
        self.taken: list[int] = []
        """Tokens of the whole chunk that the last one of this replica holds."""
        self.parts = int(str(function.attrs.get("micro_batches", 1)))
        self.caches: dict[str, torch.Tensor] = {}
        self.used = (0, 0)
        self._random = torch.Generator().manual_seed(0)
        self._vocabulary = min(
            (int(str(op.operands[1].type.shape[0])) for op in function.ops if op.name == "embed"
             and isinstance(op.operands[1].type, TensorType)), default=2,
        )  # fmt: skip
        total = max(map(sum, zip(*CHUNKS, strict=True)))
        self._pages = -(-total // PAGE)
        for arg in function.args:
            if isinstance(arg.type, CacheType):
                symbols = {s: len(self.used) * self._pages for s in arg.type.symbols()}
                layers, pages, _, *width = TensorType(arg.type.dtype, arg.type.shape).bound(symbols)
                self.caches[arg.name] = torch.zeros(layers, pages, PAGE, *width, dtype=torch.float64)

    def joined(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The results of all micro-batches one after the other, as the whole batch has them."""
        parts = self.parts
        return [torch.cat(outputs[i : i + parts]) for i in range(0, len(outputs), parts)] if parts > 1 else outputs

    def chunk(self, tokens: tuple[int, ...]) -> list[Any]:
        """Arguments for the next `tokens` of each sequence, of which this replica gets its own."""
        ends = [u + t for u, t in zip(self.used, tokens, strict=True)]
        ids = torch.randint(0, self._vocabulary, (sum(tokens),), generator=self._random)
        owner = [b for b, t in enumerate(tokens) for _ in range(t)]
        replica, replicas = self.share
        mine = [b for b in range(len(tokens)) if b % replicas == replica]
        self.taken = [t for t, b in enumerate(owner) if b in mine]
        known: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}
        for k in range(self.parts):
            # Part k of a split batch has the sequences from k / parts of them on; it may have none.
            few = mine[len(mine) * k // self.parts : len(mine) * (k + 1) // self.parts]
            described = self._describe(few, tokens, ends)
            described["ids"] = ids[[t for t, b in enumerate(owner) if b in few]]
            suffix = f"_{k}" if self.parts > 1 else ""
            known |= {name + suffix: value for name, value in described.items()}
            counts |= {f"{symbol}{k}": len(described["ids"]) for symbol in "TRSB"}
        self.used = (ends[0], ends[1])
        return [self._argument(arg.name, arg.type, known, len(self.taken), counts) for arg in self.function.args]

    def _describe(self, few: list[int], tokens: tuple[int, ...], ends: list[int]) -> dict[str, torch.Tensor]:
        """Where the next tokens of some of the sequences stand."""
        sequences = len(tokens)
        seq = [i for i, b in enumerate(few) for _ in range(tokens[b])]
        pos = [p for b in few for p in range(ends[b] - tokens[b], ends[b])]
        # Pages of the sequences lie interleaved and backwards, so that a wrong page shows.
        pages = [[self._pages * sequences - 1 - sequences * n - b for n in range(self._pages)] for b in few]
        return {
            "seq": torch.tensor(seq, dtype=torch.int64),
            "pos": torch.tensor(pos, dtype=torch.int64),
            "pages": torch.tensor(pages, dtype=torch.int64).reshape(len(few), self._pages),
            "starts": torch.tensor([sum(ends[b] for b in few[:i]) for i in range(len(few) + 1)]),
            "rows": torch.arange(len(seq)),
        }

    def _argument(
        self, name: str, type: Any, known: dict[str, torch.Tensor], count: int, counts: dict[str, int]
    ) -> Any:
        if isinstance(type, IndexType):
            return 0
        if isinstance(type, CacheType):
            return self.caches[name]
        shape = type.bound(dict.fromkeys(type.symbols(), count) | counts)
        if type.dtype.startswith(("i", "u", "b")) and not type.dtype.startswith("bf"):
            return known[name].int() if name in known else torch.zeros(shape, dtype=TORCH[type.dtype])
        return torch.randn(shape, generator=self._random, dtype=torch.float64)


@dataclass(frozen=True)
class _Step:
    """One op of one call of a function, and its values."""

    function: str
    call: int
    op: Op
    results: list[torch.Tensor]

    def place(self) -> tuple[object, ...]:
        """Function, call and source line: ops that may stand for one another before and after a pass."""
        loc = self.op.loc
        return (self.function, self.call, *((loc.file, loc.line) if loc else (self.op.name,)))


class _Run:
    """Results of the entries, and the values of all ops by function, call and source line."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, int, int], torch.Tensor] = {}
        self.rows: dict[tuple[str, int, int], list[int]] = {}
        """Tokens of the chunk whose rows a result holds."""
        self.steps: list[_Step] = []
        self.routed: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []
        """Experts, and scores before their non-linearity, of every routing in the order of evaluation."""
        self.ranks: list[_Run] = []
        """The runs of the ranks, where there are several."""
        self.nudged = False
        """Whether a token was given other experts than its scores alone choose."""
        self._calls: Counter[str] = Counter()

    def of_rank(self, rank: int, ranks: int) -> _Run | None:
        """The run of one of `ranks` ranks; None when there was another number of them."""
        runs = self.ranks or [self]
        return runs[rank] if len(runs) == ranks else None

    def note(self, function: Function, op: Op, results: list[Any]) -> None:
        """Record an op of a call; a call begins with the function's first op."""
        if op is function.ops[0]:
            self._calls[function.name] += 1
        tensors = [r for r in results if isinstance(r, torch.Tensor)]
        if tensors:
            self.steps.append(_Step(function.name, self._calls[function.name], op, tensors))


def _distance(a: torch.Tensor, b: torch.Tensor | None) -> float:
    """|a - b| / |a|; infinite for another shape or values that are not finite."""
    if b is None or a.shape != b.shape or not torch.isfinite(b).all():
        return float("inf")
    a, b = a.double(), b.double()
    norm = a.norm().item()
    return (a - b).norm().item() / norm if norm else float(b.norm().item() > 0)


def _worst_row(a: torch.Tensor, b: torch.Tensor | None) -> float:
    """The greatest |a - b| of a row in units of the rows' root mean square norm."""
    if b is None or a.shape != b.shape or not torch.isfinite(b).all():
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.double().reshape(a.shape[0], -1), b.double().reshape(a.shape[0], -1)
    typical = a.norm(dim=1).square().mean().sqrt().item()
    worst = (a - b).norm(dim=1).max().item()
    return worst / typical if typical else float(worst > 0)


def _hidden(before: _Run, after: _Run, bound: float) -> Departure | None:
    """The first op with a row that moved beyond `bound`, although the results did not: a wrong expert that few reach.

    Ops are those of one function, call, source line, name and shape, in order; where a pass changed their number they
    are not compared. Routing is judged by its scores: the order of a token's experts is free.
    """
    runs: list[defaultdict[object, list[tuple[_Step, torch.Tensor]]]] = []
    for run in (before, after):
        runs.append(defaultdict(list))
        for step in run.steps:
            for i, r in enumerate(step.results):
                if r.is_floating_point() and step.op.name != "moe.route":
                    runs[-1][step.place(), step.op.name, i, r.shape].append((step, r))
    for key, steps in runs[1].items():
        if len(steps) == len(runs[0][key]):
            for (_, a), (step, b) in zip(runs[0][key], steps, strict=True):
                if (moved := _worst_row(a, b)) > bound:
                    where = f"@{step.function}, call {step.call}: {print_op(step.op)}"
                    return Departure(moved, f"a row of one op does, results hide it; {where}")
    return None


def _first(before: _Run, after: _Run, bound: float) -> str:
    """The first op to finish whose value no op of its function, call, source line, name and shape had before.

    An op of a new name stands for those of its line that it replaced when it is the last of them.
    """
    known: defaultdict[object, list[torch.Tensor]] = defaultdict(list)
    for step in before.steps:
        for r in step.results:
            known[step.place(), r.shape].append(r)
            known[step.place(), r.shape, step.op.name].append(r)
    last = {step.place(): step for step in after.steps}
    for step in after.steps:
        for r in step.results:
            old = known[step.place(), r.shape, step.op.name]
            if not old and last[step.place()] is step:
                old = known[step.place(), r.shape]
            moved = min((_distance(o, r) for o in old), default=0.0)
            if moved > bound:
                return f"first in @{step.function}, call {step.call}, by {moved:.2g}: {print_op(step.op)}"
    return "no single op departs from those of its source line"
