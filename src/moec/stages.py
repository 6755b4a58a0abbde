"""The stages of compilation as objects: `trace -> optimize -> compile`, each printable and queryable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moec.errors import InputError
from moec.plan import Plan, WrongPhase

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moec.frontend import ModelSource
    from moec.ir import Module
    from moec.passes.planning import LayoutRequest
    from moec.targets import Target


class WrongDrafts(InputError):
    """A number of drafted tokens that the model cannot have."""

    template: ClassVar[str] = "--mtp {drafts}: the drafted tokens of a step must be {expected}"


class DraftsOfRanks(InputError):
    """Multi-token prediction over several ranks."""

    template: ClassVar[str] = "--mtp runs in one process: compile it for one device (it is planned for {ranks} ranks)"


class NoOnnx(InputError):
    """An ONNX graph where the package that reads them is not installed."""

    template: ClassVar[str] = "{model}: reading an ONNX graph needs the package onnx: pip install 'moec[onnx]'"


MOST_DRAFTS = 8
PHASES = ("both", "prefill", "decode")


def default_limits(target: Target) -> tuple[int, int]:
    """Sequences and tokens of a prefill chunk that an artifact is compiled for when the user names none."""
    if target.kind != "cpu":
        return 128, 4096
    # Weights are widened for matrix tiles once a chunk: the more rows an expert has, the less that counts.
    return 1, 1024 if "amx_bf16" in target.device.isa else 256


@dataclass(frozen=True)
class Traced:
    """A model as imported IR."""

    source: ModelSource
    ir: Module
    notes: tuple[str, ...] = ()
    """What the number formats of the checkpoint mean for the IR."""

    def optimize(
        self,
        target: str | Target = "cpu",
        *,
        phase: str = "both",
        batch: int | None = None,
        context: int | None = None,
        chunk: int | None = None,
        drafts: int | None = None,
        layout: LayoutRequest | None = None,
        recipe: str = "auto",
        passes: Sequence[str] = (),
        verify: str = "structure",
        strict: bool = False,
        dump: str | Path | None = None,
    ) -> Plan:
        """Run the target's pipeline on a copy of the IR.

        `phase` keeps one of the two entry points. `context` defaults to the model's own, at most 4096; `batch` and
        `chunk` as `default_limits` says. `drafts`, of a model traced with its
        multi-token-prediction module, are the most tokens that it drafts a step (default 1). `layout` asks for degrees
        of parallelism; None takes the target's. Raises UnknownTarget, WrongPhase, WrongDrafts, DraftsOfRanks,
        WrongLayout, WrongRedundancy, CutBlock, WrongRanks, PassSpecError, PassError, PassFailure or StrictError.
        """
        from moec import targets
        from moec.ir.rewrite import clone_module
        from moec.passes.base import Limits
        from moec.passes.laid_out import context_of, idle_requests
        from moec.passes.manager import Manager, StrictError
        from moec.passes.pipeline import pipeline
        from moec.passes.planning.layout import LayoutRequest
        from moec.passes.registry import parse_spec
        from moec.passes.sharding.memory import memory_shortage

        found = targets.load(target) if isinstance(target, str) else target
        few, short = default_limits(found)
        context = min(4096, self.source.config.max_position_embeddings) if context is None else context
        # A device with many cores prefills several prompts in a step.
        most = context if found.kind == "cpu" else context * (batch or few)
        doubts = (
            [f"chunk {chunk} is more than a step has: {most} tokens taken"]
            if chunk is not None and chunk > most
            else []
        )
        chunk = min(short if chunk is None else chunk, most)
        limits = Limits(few if batch is None else batch, context, chunk, self._drafts(drafts))
        module = clone_module(self.ir)
        if phase != "both":
            _keep_phase(module, phase)
        asked = context_of(self.ir, found, limits, layout, recipe)
        assert asked.layout is not None
        if limits.drafts and asked.layout.ranks > 1:
            raise DraftsOfRanks(ranks=asked.layout.ranks)
        doubts += idle_requests(layout or LayoutRequest(), asked.layout)
        if strict and doubts:
            raise StrictError(where="layout", message=doubts[0])
        module.attrs["target"] = asked.target.name
        manager = Manager(asked, verify, strict, Path(dump) if dump else None)
        manager.run(
            module,
            pipeline(asked.target, recipe, passes, asked.layout.ranks),
            [parse_spec(spec)[0].name for spec in passes],
        )
        if shortage := memory_shortage(module, manager.context):
            # Somebody who lays a model out over devices wants it to run there; the program of a model that is too large
            # for one device is worth a look all the same.
            if asked.layout.ranks > 1 and found.kind != "cpu":
                raise shortage
            if strict:
                raise StrictError(where="memory", message=str(shortage))
            doubts.append(str(shortage))
        return Plan(self.source, module, manager.context, manager.records, manager.dump, doubts, manager.unscheduled)

    def _drafts(self, asked: int | None) -> int:
        """Tokens that are drafted a step: 0 without a module for it."""
        has = "draft" in self.ir.functions
        drafts = int(has) if asked is None else asked
        if has != (drafts > 0) or drafts > MOST_DRAFTS:
            expected = f"1 to {MOST_DRAFTS}" if has else "0: the model was traced without its module (mtp=True)"
            raise WrongDrafts(drafts=drafts, expected=expected)
        return drafts


def _keep_phase(module: Module, phase: str) -> None:
    """Drop the other entry point and what only it needs. Raises WrongPhase."""
    from moec.ir.rewrite import remove_unused

    if phase not in PHASES or phase not in module.functions:
        raise WrongPhase(phase=phase, reason=f"must be one of {', '.join(PHASES)}")
    remove_unused(module, [phase])


def trace(
    model: str | nn.Module,
    overrides: Mapping[str, str] | None = None,
    weights: str | Path | None = None,
    *,
    mtp: bool = False,
    example_inputs: Sequence[torch.Tensor] | None = None,
) -> Traced:
    """Trace a preset, a Hugging Face folder, or a definition; reads no weight and runs nothing of a model folder.

    With `mtp` the model's multi-token-prediction module comes along as `@draft`.

    The path of an ONNX file whose graph maps token ids to logits is raised like a torch module.

    A torch module that maps token ids i64[1, T] to logits is exported with `example_inputs` (default: 29 zeros) and
    raised; `traced.source.report` says what was. Raises the InputErrors of `moec.frontend`.

    The headers of `weights`, else of the folder of the model, tell which tensors are FP8 with scales: these are loaded
    as they are; TensorError says which scales are missing or do not fit.
    """
    from moec.frontend import find_model, trace_model
    from moec.frontend.checkpoint import adopt, open_checkpoint
    from moec.frontend.safetensors_header import CheckpointError
    from moec.frontend.trace import NoDraftModule

    if not isinstance(model, str):
        from moec.frontend.torch_import import trace_module
        from moec.frontend.torch_import.exported import example_ids

        if mtp:
            raise NoDraftModule(model=type(model).__name__, reason="a torch module is traced as it is")
        example = (example_ids(),) if example_inputs is None else example_inputs
        imported, module = trace_module(model, example)
        return Traced(imported, module)
    if model.endswith(".onnx"):
        return _trace_onnx(Path(model), bool(overrides) or mtp or weights is not None)
    source = find_model(model, overrides)
    module = trace_model(source, mtp)
    folder = Path(weights) if weights is not None else source.folder
    if folder is None:
        return Traced(source, module)
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError:
        # What is wrong is said when the weights are read, if ever.
        return Traced(source, module)
    return Traced(source, module, tuple(adopt(module, checkpoint)))


def _trace_onnx(path: Path, changed: bool) -> Traced:
    """An ONNX graph with the weights that are its own."""
    try:
        from moec.frontend.onnx_import import trace_onnx
        from moec.frontend.onnx_import.files import OnnxError
    except ModuleNotFoundError:
        raise NoOnnx(model=path) from None
    if changed:
        raise OnnxError(file=path, message="a graph is compiled as it is: leave --set, --mtp and --weights away")
    source, module = trace_onnx(path)
    return Traced(source, module, tuple(str(source.report).splitlines()))
