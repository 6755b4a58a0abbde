"""The stages of compilation as objects: `trace -> optimize -> compile`, each printable and queryable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moec import __version__
from moec.errors import InputError

if TYPE_CHECKING:
    from moec.frontend import ModelSource
    from moec.ir import Module
    from moec.passes.base import Context
    from moec.passes.manager import Record
    from moec.targets import Target


class NoWeights(InputError):
    """A model without weights, where weights were needed."""

    template: ClassVar[str] = "{model} has no weights: pass --weights FOLDER, --random-weights SEED or --no-weights"


class UnsupportedTarget(InputError):
    """A target for which no code can be generated."""

    template: ClassVar[str] = "target {target} is a {kind} device: artifacts are for CPUs so far; see moec plan"


@dataclass(frozen=True)
class Traced:
    """A model as imported IR."""

    source: ModelSource
    ir: Module

    def optimize(
        self,
        target: str | Target = "cpu",
        *,
        batch: int = 1,
        context: int | None = None,
        chunk: int = 256,
        recipe: str = "auto",
        passes: Sequence[str] = (),
        verify: str = "structure",
        strict: bool = False,
        dump: str | Path | None = None,
    ) -> Plan:
        """Run the target's pipeline on a copy of the IR.

        `context` defaults to the model's own, at most 4096.
        Raises UnknownTarget, UnsupportedTarget, PassError, PassFailure or StrictError.
        """
        from moec import targets
        from moec.ir.rewrite import clone_module
        from moec.passes.base import Context, Limits
        from moec.passes.manager import Manager
        from moec.passes.pipeline import cpu_pipeline

        found = targets.load(target) if isinstance(target, str) else target
        if found.kind != "cpu":
            raise UnsupportedTarget(target=found.name, kind=found.kind)
        context = min(4096, self.source.config.max_position_embeddings) if context is None else context
        limits = Limits(batch=batch, context=context, chunk=min(chunk, context))
        module = clone_module(self.ir)
        module.attrs["target"] = found.name
        manager = Manager(Context(found, limits), verify, strict, Path(dump) if dump else None)
        manager.run(module, cpu_pipeline(recipe, passes))
        return Plan(self.source, module, manager.context, manager.records)


@dataclass(frozen=True)
class Plan:
    """A module optimised for a target."""

    source: ModelSource
    ir: Module
    context: Context
    records: list[Record] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """What the passes warned of, by pass."""
        return [f"{r.name}: {w}" for r in self.records for w in r.warnings]

    def compile(
        self,
        out: str | Path,
        *,
        weights: str | Path | None = None,
        random_weights: int | None = None,
        no_weights: bool = False,
        note: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Artifact:
        """Compile the kernels, pack the weights and write the artifact folder `out`, whole or not at all.

        Weights come from `weights`, else from random numbers, else from the model's own folder.
        Raises NoWeights, CheckpointError, TensorError, NoKernel, OutputExists or WriteFailed.
        """
        from moec.codegen import artifact
        from moec.codegen.pack import pack_weights
        from moec.codegen.tvm.compile import compile_module
        from moec.ir import print_module

        say = note or (lambda line: None)
        target, limits = self.context.target, self.context.limits
        loader = None if no_weights else self._loader(weights, random_weights, say)
        sizes = {"batch": limits.batch, "context": limits.context, "chunk": limits.chunk}
        with artifact.artifact_folder(Path(out)) as work:
            compiled = compile_module(self.ir, target, sizes)
            say(compiled.note)
            (work / "kernels").mkdir()
            shutil.copyfile(compiled.library, work / "kernels" / "kernels.so")
            artifact.write_json(work / "kernels" / "kernels.json", compiled.kernels)
            (work / "program.ir").write_text(print_module(self.ir))
            artifact.write_json(work / "plan.json", self._plan_json(compiled.entries))
            if loader is not None:
                (work / "weights").mkdir()
                pack_weights(self.ir, loader, work / "weights" / "rank-00000.safetensors", progress)
            artifact.copy_tokenizer(self.source.folder, work)
            artifact.write_manifest(work, self._facts(sizes))
        return Artifact(Path(out))

    def _loader(
        self, weights: str | Path | None, seed: int | None, say: Callable[[str], None]
    ) -> Callable[[str, tuple[int, ...], str], Any]:
        from moec.frontend.checkpoint import RandomWeights, bind, open_checkpoint

        if weights is None and seed is not None:
            return RandomWeights(seed).load
        folder = Path(weights) if weights is not None else self.source.folder
        if folder is None:
            raise NoWeights(model=self.source.name)
        checkpoint = open_checkpoint(folder)
        for line in bind(self.ir, checkpoint):
            say(line)
        return checkpoint.load

    def _plan_json(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        from moec.codegen.tvm.compile import PAGE
        from moec.ir import CacheType

        limits = self.context.limits
        kv = next(a.type for a in self.ir.functions["decode"].args if isinstance(a.type, CacheType))
        pages = limits.batch * -(-limits.context // PAGE)
        dtype = {"f32": "float32", "bf16": "uint16"}[kv.dtype]
        shape = [pages if str(d) == "P" else d for d in kv.shape]
        return {"entries": dict(entries), "page_size": PAGE, "cache": {"dtype": dtype, "shape": shape}}

    def _facts(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        c, target = self.source.config, self.context.target
        device = target.device
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
                "triple": _triple(device.arch),
                "mcpu": device.arch,
                "features": list(device.isa),
                "cores": int(device.cores),
            },
            "limits": dict(sizes),
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


def _triple(arch: str) -> str:
    return "aarch64-linux-gnu" if arch.startswith(("arm", "aarch64")) else "x86_64-linux-gnu"


def trace(model: str, overrides: Mapping[str, str] | None = None) -> Traced:
    """Trace a preset, a Hugging Face folder, or a definition; reads no weight and runs nothing of a model folder."""
    from moec.frontend import find_model, trace_model

    source = find_model(model, overrides)
    return Traced(source, trace_model(source))
