"""A module for a GPU as kernels and launches: what an artifact's `kernels/` folder and plan.json get."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moec.codegen.exchanged import comm_bounds
from moec.codegen.stage import stage_module
from moec.codegen.triton import aot
from moec.codegen.triton import tiles as measured
from moec.codegen.triton.errors import CheckFailed, NoKernel
from moec.codegen.triton.fused.groups import VIEWS
from moec.codegen.triton.lower.entry import Lowered, lower_phase, parts_of
from moec.codegen.triton.lower.lower import Phase
from moec.codegen.triton.lower.order import CONTROL
from moec.codegen.triton.lower.places import Step
from moec.codegen.triton.lower.table import KernelTable
from moec.codegen.triton.spec import kernel
from moec.ir import CacheType, Module, Op, TensorType
from moec.ir.mesh import mesh_of
from moec.targets import Target

PAGE = 64
PHASES: tuple[str, ...] = ("prefill", "decode", "draft")
MOST_DRAFTED = 128
"""Tokens of one prompt that a call of the multi-token-prediction module takes at most: its kernels are decode's."""
MOST_ROWS = 128
"""Rows of logits that one prefill call gives at most: 129,280 of them are half a megabyte each."""
MOVED = tuple(
    f"comm.{name}" for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "rows", "send", "recv")
)
"""Ops that the communicator does without a kernel of ours."""


@dataclass(frozen=True)
class Program:
    """All phases of every pipeline stage, lowered, and their kernels."""

    stages: tuple[dict[str, Lowered], ...]
    table: KernelTable
    bounds: dict[str, dict[str, int]]
    sms: int
    notes: tuple[str, ...] = ()
    draw: Step = field(default_factory=dict)
    """The launch that draws tokens from the logits of a call."""

    @property
    def phases(self) -> dict[str, Lowered]:
        """Those of the first stage."""
        return self.stages[0]

    def plan(self, module: Module) -> dict[str, Any]:
        """The part of plan.json that execution reads."""
        kv = next(a.type for f in module.functions.values() for a in f.args if isinstance(a.type, CacheType))
        pages = next(iter(self.bounds.values()))["P"]
        shape = [pages if str(d) == "P" else d for d in kv.shape]
        first, *others = (self._programs(phases) for phases in self.stages)
        sent = next((op for _, op in module.ops() if op.name == "comm.dispatch"), None)
        slots = {} if sent is None else {"slots": {n: sent.attrs[n] for n in ("experts", "slots")}}
        return {
            "page_size": PAGE,
            "cache": {"shape": shape, "row_bytes": kv.row_bytes(), "dtype": kv.dtype},
            **first,
            **({"stages": others} if others else {}),
            **slots,
            **_states(module),
            "draw": self.draw,
        }

    def _programs(self, phases: Mapping[str, Lowered]) -> dict[str, Any]:
        """A stage: the arena that it needs, and its phases."""
        sizes = {"max_tokens": "T", "max_rows": "R", "max_sequences": "B"}
        return {
            "arena_bytes": max(p.arena for p in phases.values()),
            "programs": {
                name: {
                    "steps": p.steps,
                    **{n: self.bounds[name][s] for n, s in sizes.items()},
                    **({"parts": p.parts} if p.parts > 1 else {}),
                }
                for name, p in phases.items()
            },
        }

    def compile(self, jobs: int = 0) -> list[aot.Compiled]:
        """All kernels, from the cache or compiled into it by `jobs` processes, by default one for each usable CPU.

        Raises CompileFailed, CheckFailed with all that failed as `instances`, or TritonMissing.
        """
        wanted = [e.instance for e in self.table.entries.values()]
        return aot.compile_kernels(wanted, jobs=jobs or len(os.sched_getaffinity(0)))

    def note(self, compiled: list[aot.Compiled]) -> str:
        """One line on what was compiled."""
        cached = sum(k.cached for k in compiled)
        spills = [n for n, k in zip(self.table.entries, compiled, strict=True) if k.spills_listed]
        line = f"{len(compiled)} GPU kernels for {self.table.arch}, {cached} from the cache"
        line += f", tiles as measured in {self.table.measured} places" if self.table.measured else ""
        refused = len(self.table.refused)
        line += f", {refused} tiles replaced because their kernels spill or fail another check" if refused else ""
        return line + (f"; known spills in {', '.join(spills)}" if spills else "")

    def write(self, compiled: list[aot.Compiled], folder: Path) -> list[dict[str, Any]]:
        """Cubins, PTX, sources and kernels.json, whose records name the ops that each kernel computes.

        The file of a generated kernel begins with those ops.
        """
        records = []
        for (name, entry), built in zip(self.table.entries.items(), compiled, strict=True):
            uses = {function: sorted(indices) for function, indices in sorted(entry.uses.items())}
            records.append({**built.record(name), "ops": sorted(entry.ops), "uses": uses})
        aot.write(compiled, folder, records)
        for entry in self.table.entries.values():
            if entry.instance.spec.source:
                file = folder / f"{entry.instance.spec.name}.py"
                said = "".join(f"# {line}\n" for text in dict.fromkeys(entry.texts) for line in text.splitlines())
                file.write_text(f"# Generated by moec from\n{said}{file.read_text(encoding='utf-8')}", encoding="utf-8")
        return records


def compiled_program(module: Module, target: Target, limits: Mapping[str, int]) -> tuple[Program, list[aot.Compiled]]:
    """The lowered module and its kernels; a tile whose kernel fails its checks gives way to the next.

    Raises what `lower_module` and `Program.compile` raise.
    """
    refused: set[tuple[str, object]] = set()
    while True:
        program = lower_module(module, target, limits, refused=refused)
        try:
            return program, program.compile()
        except CheckFailed as error:
            more = program.table.refusable(error.instances)
            if not more - refused:
                raise
            refused |= more


GATED = ("swiglu", "moe.experts")


def lower_module(
    module: Module, target: Target, limits: Mapping[str, int], tiles: Mapping[str, measured.Measured] | None = None,
    refused: Collection[tuple[str, object]] = (),
) -> Program:  # fmt: skip
    """Lower every phase of a module; `limits`: batch, context, chunk.

    `tiles` replaces the tiles that were measured for the architecture, `refused` are predicted ones not to take. Raises
    NoKernel, UnsupportedKernel, UnknownArchitecture or UnmetRequirement.
    """
    for _, op in module.ops():
        if op.name in GATED and "act" in op.attrs:
            raise NoKernel(op=op.name, reason=f"only SwiGLU has one, not a gate of {op.attrs['act']}")
    if tiles is None:
        tiles = measured.load(target.device.arch)
    table = KernelTable(target, tiles, refused)
    sms = int(target.device.cores)
    stages: list[dict[str, Lowered]] = []
    bounds: dict[str, dict[str, int]] = {}
    for number in range(mesh_of(module).pp):
        stage = stage_module(module, number)
        phases: dict[str, Lowered] = {}
        suffix = f".{number}" if mesh_of(module).pp > 1 else ""
        for name in (n for n in PHASES if n in stage.functions):
            bounds[name] = phase_bounds(name, limits, parts_of(stage.functions[name]))
            bounds[name] |= comm_bounds(stage, bounds[name].get("T0", bounds[name]["T"]))
            phase = Phase(stage, name, table, bounds[name], sms, 128 if name == "prefill" else 64, suffix)
            phases[name] = lower_phase(phase)
        stages.append(phases)
    program = Program(tuple(stages), table, bounds, sms, _notes(module), _draw(module, table))
    if missing := uncovered(module, program):
        raise NoKernel(op=missing[0], reason="nothing computes it")
    return program


def _draw(module: Module, table: KernelTable) -> Step:
    """The kernel that takes a token from every row of logits."""
    result = next(f for name in PHASES for f in module.functions.values() if f.name.startswith(name)).returns[0]
    assert isinstance(result.type, TensorType)
    vocab = int(result.type.shape[1])  # type: ignore[arg-type]
    instance = table.instance(kernel("draw"), "any", V=vocab)
    name = table.support(instance)
    options = ("temperature", "top_k", "top_p", "min_p", "key", "number")
    given: dict[str, Any] = {f"{o}_ptr": {"base": "input", "name": o, "offset": 0} for o in options}
    for end in ("logit", "token"):
        given[f"{end}_ptr"] = {"base": "output", "name": f"{end}s", "offset": 0}
    return {"kernel": name, "grid": ["R"], "arguments": {n: given.get(n, vocab) for n in instance.signature}}


def _states(module: Module) -> dict[str, Any]:
    """The hidden states that entries give and take, where there is a module that drafts."""
    draft = module.functions.get("draft")
    if draft is None:
        return {}
    t = draft.returns[1].type
    assert isinstance(t, TensorType)
    return {"states": {"width": t.shape[1], "dtype": t.dtype}}


def _notes(module: Module) -> tuple[str, ...]:
    """What the GPU runtime does otherwise than the program says."""
    forwarded = any(
        op.attrs.get("via") == "node" and 1 < int(op.attrs["per_node"]) < int(op.attrs["ranks"])  # type: ignore[arg-type]
        for _, op in module.ops()
        if op.name == "comm.dispatch"
    )
    line = "rows go from rank to rank directly: no rank forwards inside its node on GPUs yet (via = node is planned)"
    return (line,) if forwarded else ()


def phase_bounds(name: str, limits: Mapping[str, int], parts: int = 1) -> dict[str, int]:
    """The greatest value of every run-time symbol: prefill takes a chunk of one sequence, decode a token of each and
    those that were drafted for it, a draft as many or a piece of a prompt.

    Tokens of sequences that have not equally many count as sequences of their own. `Q`: most tokens of a sequence.
    """
    context, batch = limits["context"], limits["batch"]
    queries = 1 + limits.get("drafts", 0)
    step, chunk = batch * queries, min(limits["chunk"], context)
    pages = -(-context // PAGE)
    if name == "prefill":
        tokens, rows, sequences, queries = chunk, min(chunk, MOST_ROWS), 1, chunk
    elif name == "decode":
        tokens = rows = sequences = step
    else:
        queries = max(queries, min(chunk, MOST_DRAFTED))
        tokens = rows = max(step, queries)
        sequences = step
    bounds = {
        "T": tokens, "R": rows, "B": sequences, "N": pages, "S": sequences * context, "C": context,
        "P": batch * pages + 1, "Q": queries,
    }  # fmt: skip
    if parts > 1:
        # As many sequences in each micro-batch, to within one.
        each = {"T": -(-tokens // parts), "R": -(-rows // parts), "B": -(-sequences // parts)}
        each["S"] = each["B"] * context
        bounds |= {f"{symbol}{k}": size for symbol, size in each.items() for k in range(parts)}
    return bounds


def uncovered(module: Module, program: Program) -> list[str]:
    """Ops that no kernel computes, as `name in @function`; views belong to the kernels that read through them."""
    done: dict[str, set[int]] = {}
    for entry in program.table.entries.values():
        for function, indices in entry.uses.items():
            done.setdefault(function, set()).update(indices)
    return [
        f"{op.name} in @{function.name}"
        for function in module.functions.values()
        for i, op in enumerate(function.ops)
        if op.name not in (*CONTROL, *MOVED)
        and i not in done.get(function.name, set())
        and not _idle_view(op, function.ops)
    ]


def _idle_view(op: Op, ops: list[Op]) -> bool:
    """Whether an op is a view of which nothing is read."""
    used = {v for o in ops for v in o.values()}
    return op.name in VIEWS and all(isinstance(r.type, TensorType) and r not in used for r in op.results)
