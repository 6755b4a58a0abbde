"""A module optimised for a target, and what becomes of it: its text on disk, or a compiled artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moec import __version__
from moec.errors import InputError

if TYPE_CHECKING:
    from moec.codegen.resume import Partial
    from moec.frontend import ModelSource
    from moec.ir import Function, Module
    from moec.packing import Tensors
    from moec.passes.base import Context
    from moec.passes.manager import Record
    from moec.targets import Target


class WrongPhase(InputError):
    """A phase that the model does not have, or that an artifact cannot do without."""

    template: ClassVar[str] = "phase {phase}: {reason}"


@dataclass(frozen=True)
class Plan:
    """A module optimised for a target."""

    source: ModelSource
    ir: Module
    context: Context
    records: list[Record] = field(default_factory=list)
    dump: Path | None = None
    """Folder with the report of the passes, where one was asked for."""
    doubts: list[str] = field(default_factory=list)
    """What was asked for and has no effect, and what would not fit the machine."""
    unscheduled: Module | None = None
    """The module before it was split into micro-batches; None without passes that do so."""

    @property
    def warnings(self) -> list[str]:
        """What was asked for in vain or does not fit, and what the passes warned of, by pass."""
        return [*self.doubts, *(f"{r.name}: {w}" for r in self.records for w in r.warnings)]

    def compile(
        self,
        out: str | Path,
        *,
        weights: str | Path | None = None,
        random_weights: int | None = None,
        no_weights: bool = False,
        source: bool = False,
        note: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Artifact:
        """Compile the kernels, pack the weights and write the artifact folder `out`, whole or not at all.

        An interrupted packing of many weights leaves its state beside `out`; the same call goes on from there.
        `source` adds the text of the CPU kernels; those of GPUs come with theirs.
        Weights come from `weights`, else from random numbers, else from the model's own folder.
        Raises NoWeights, CheckpointError, TensorError, NoKernel, UnsupportedKernel, UnmetRequirement, CompileFailed,
        CheckFailed, OutputExists, DiskTooSmall or WriteFailed.
        """
        from moec import packing
        from moec.codegen import artifact
        from moec.codegen.stage import stage_module
        from moec.ir.mesh import mesh_of

        say = note or (lambda line: None)
        if self.context.target.kind == "cpu" and len(self.phases) < 2:
            raise WrongPhase(phase=self.phases[0], reason="artifacts for CPUs hold both phases; leave --phase away")
        tensors = None if no_weights else packing.tensors_of(self.ir, self.source, weights, random_weights, say)
        mesh = mesh_of(self.ir)
        on_cpu = self.context.target.kind == "cpu"
        if source and not on_cpu:
            say("the source of GPU kernels lies beside them in any case")
        base, turns = self._arranged() if on_cpu else (self._whole(say), {})
        modules = [stage_module(base, stage) for stage in range(mesh.pp)]
        with artifact.artifact_folder(Path(out)) as work, self._partial(Path(out), tensors, say) as partial:
            (work / "kernels").mkdir()
            kernels = work / "kernels"
            if on_cpu:
                interface = self._cpu_kernels(kernels, modules, source, say)
            else:
                interface = self._gpu_kernels(kernels, base, say)
            if turns:
                interface["entries"]["decode"] |= turns
            self._write_program(work, interface)
            if tensors is not None:
                (work / "weights").mkdir()
                told = progress or (lambda done, total: None)
                packing.pack_ranks(modules, mesh, tensors, work / "weights", partial, told)
                if mesh.ranks == 1:
                    packing.account(self.ir, tensors, self.dump, say)
            artifact.copy_tokenizer(self.source.folder, work)
            artifact.write_manifest(work, self._facts())
        return Artifact(Path(out))

    @property
    def _sizes(self) -> dict[str, int]:
        limits = self.context.limits
        sizes = {"batch": limits.batch, "context": limits.context, "chunk": limits.chunk}
        return {**sizes, **({"drafts": limits.drafts} if limits.drafts else {})}

    def _arranged(self) -> tuple[Module, dict[str, Any]]:
        """The module whose segments CPU ranks compile, and what plan.json says of the turns that a schedule takes."""
        from moec.codegen.scheduled import arrange
        from moec.codegen.turn_order import check_turns
        from moec.ir.issue import scheduled
        from moec.ir.mesh import mesh_of
        from moec.ir.rewrite import clone_module

        if self.unscheduled is None or not scheduled(self.ir):
            return self.ir, {}
        other = [f.name for f in self.ir.functions.values() if "micro_batches" in f.attrs and f.name == "prefill"]
        if other or mesh_of(self.ir).pp > 1:
            raise WrongPhase(
                phase="both",
                reason="CPU ranks follow a schedule of decode without pipeline stages: give both passes phase=decode",
            )
        base = clone_module(self.unscheduled)
        turns = arrange(base, self.ir, "decode")
        parts = int(str(self.ir.functions["decode"].attrs.get("micro_batches", 1)))
        check_turns(base, "decode", turns, parts)
        return base, {"turns": [list(turn) for turn in turns], "parts": parts}

    def _cpu_kernels(
        self, folder: Path, modules: Sequence[Module], source: bool, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """A library for the module of every pipeline stage; returns the call interface of the first and the others."""
        from moec.codegen import artifact
        from moec.codegen.tvm.compile import compile_module

        kernels: dict[str, Any] = {}
        interfaces = []
        for stage, module in enumerate(modules):
            compiled = compile_module(module, self.context.target, self._sizes, source)
            say(compiled.note)
            shutil.copyfile(compiled.library, folder / artifact.library_name(stage))
            if compiled.source is not None:
                shutil.copytree(compiled.source, folder / artifact.source_name(stage))
            kernels.update({k["name"]: k for k in compiled.kernels})
            interfaces.append(self._call_interface(module, compiled.entries))
        artifact.write_json(folder / "kernels.json", list(kernels.values()))
        return {**interfaces[0], **({"stages": interfaces[1:]} if len(interfaces) > 1 else {})}

    def _whole(self, say: Callable[[str], None]) -> Module:
        """The module that GPU ranks run: prefill takes one prompt at a time, and is not split into micro-batches."""
        from moec.codegen.stage import with_entries

        split = [n for n, f in self.ir.functions.items() if n.partition(".")[0] == "prefill" and _parts(f) > 1]
        if not split or self.unscheduled is None:
            return self.ir
        names = ", ".join(f"@{name}" for name in split)
        say(f"{names}: compiled without micro-batches and streams: on GPUs a prompt is prefilled whole so far")
        return with_entries(self.ir, self.unscheduled, split)

    def _gpu_kernels(self, folder: Path, module: Module, say: Callable[[str], None]) -> dict[str, Any]:
        from moec.codegen.triton.program import compiled_program
        from moec.passes.sharding.memory import arena_shortage

        program, compiled = compiled_program(module, self.context.target, self._sizes)
        say(program.note(compiled))
        for line in program.notes:
            say(line)
        program.write(compiled, folder)
        plan = program.plan(module)
        arena = max(stage["arena_bytes"] for stage in (plan, *plan.get("stages", ())))
        if shortage := arena_shortage(module, self.context, arena):
            say(f"warning: {shortage}")
        return plan

    def _partial(
        self, out: Path, tensors: Tensors | None, say: Callable[[str], None]
    ) -> AbstractContextManager[Partial | None]:
        """What an interrupted packing left behind, where the origin of the tensors tells that they are the same."""
        from moec.codegen.resume import key_of, resumable

        if tensors is None or tensors.origin is None:
            return nullcontext()
        return resumable(out, key_of(self.ir, tensors.origin), say)

    def save(self, out: str | Path) -> None:
        """Write program.ir, plan.json and a manifest into the folder `out`: what was decided, nothing that runs.

        Raises OutputExists, WrongOutput or WriteFailed.
        """
        from moec.codegen import artifact

        with artifact.artifact_folder(Path(out)) as work:
            self._write_program(work, {})
            artifact.write_manifest(work, self._facts())

    @property
    def phases(self) -> list[str]:
        """The entry points of the program."""
        return [n for n in ("prefill", "decode") if {n, f"{n}.0"} & set(self.ir.functions)]

    def _write_program(self, work: Path, interface: Mapping[str, Any]) -> None:
        from moec.codegen.artifact import write_json
        from moec.codegen.plan_json import plan_document
        from moec.ir import print_module

        (work / "program.ir").write_text(print_module(self.ir), encoding="utf-8")
        write_json(work / "plan.json", {**plan_document(self.ir, self.context, self.records), **interface})

    def _call_interface(self, module: Module, entries: Mapping[str, Any]) -> dict[str, Any]:
        from moec.codegen.tvm.compile import PAGE
        from moec.ir import CacheType

        limits = self.context.limits
        kv = next(a.type for a in module.functions["decode"].args if isinstance(a.type, CacheType))
        pages = limits.batch * -(-limits.context // PAGE)
        dtype = "uint8" if kv.quant else {"f32": "float32", "bf16": "uint16"}[kv.dtype]
        shape = [pages if str(d) == "P" else d for d in kv.shape]
        shape[-1] = kv.row_bytes() if kv.quant else shape[-1]
        return {"entries": dict(entries), "page_size": PAGE, "cache": {"dtype": dtype, "shape": shape}}

    def _facts(self) -> dict[str, Any]:
        c, target = self.source.config, self.context.target
        return {
            "moec_version": __version__,
            "model": {
                "name": self.source.name,
                "config": json.loads(json.dumps(self.source.raw)),
                "vocab": c.vocab_size,
                "eos_token_ids": list(c.eos_token_ids),
            },
            "target": {
                "name": target.name,
                **_needs(target),
            },
            "limits": self._sizes,
            "recipe": self.ir.attrs.get("recipe", ""),
        }


@dataclass(frozen=True)
class Artifact:
    """A written artifact."""

    path: Path

    def load(self, **options: Any) -> Any:
        """Open it in the runtime; see `moec.load`."""
        from moec.runtime import load

        return load(self.path, **options)


def _needs(target: Target) -> dict[str, Any]:
    """What a machine must have to run code for the target."""
    device = target.device
    if target.kind != "cpu":
        return {"kind": target.kind, "arch": device.arch, "cores": int(device.cores)}
    triple = "aarch64-linux-gnu" if device.arch.startswith(("arm", "aarch64")) else "x86_64-linux-gnu"
    return {"triple": triple, "mcpu": device.arch, "features": list(device.isa), "cores": int(device.cores)}


def _parts(function: Function) -> int:
    """Micro-batches of an entry."""
    return int(str(function.attrs.get("micro_batches", 1)))
