"""Running an artifact's prefill with a trace of every op, and the reference beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from moec import targets
from moec.codegen.tvm.compile import PAGE, compile_watched
from moec.compare.check import OpCheck, Trace
from moec.compare.oracle import transformers_logits
from moec.compare.result import Comparison, relative_error
from moec.compare.weights import StoredWeights
from moec.errors import InputError
from moec.frontend.checkpoint import bind, open_checkpoint
from moec.ir import Module, parse_module
from moec.ir.rewrite import clone_module
from moec.runtime import Model
from moec.runtime.engine import Engine
from moec.runtime.library import Library
from moec.runtime.memory import aligned_zeros
from moec.runtime.plan import Argument

BOUND = 1e-4
"""Greatest error of an op in any recipe: kernel and reference compute in FP32 on the same weights as stored."""


class LongPrompt(InputError):
    """A prompt of several chunks."""

    template: ClassVar[str] = (
        "--compare runs one chunk: the prompt has {tokens} tokens, the artifact takes {chunk} in a chunk; "
        "shorten the prompt or compile with a larger --chunk"
    )


class NotTraceable(InputError):
    """An artifact whose kernels do not run on a CPU."""

    template: ClassVar[str] = "{path} was compiled for {target}: --compare traces the kernels of CPUs"


def compare(model: Model, folder: str | Path, ids: Sequence[int]) -> Comparison:
    """Compare an artifact's prefill of `ids` with the checkpoint in `folder`.

    Raises CheckpointError or TensorError for the folder, LongPrompt or what `Model.logits` raises for the prompt,
    CompilerFailed.
    """
    artifact, path = model.artifact, Path(folder)
    if not isinstance(model.engine, Engine):
        raise NotTraceable(path=artifact.path, target=artifact.manifest.target)
    if len(ids) > model.engine.chunk:
        raise LongPrompt(tokens=len(ids), chunk=model.engine.chunk)
    logits = torch.from_numpy(model.logits([ids])[0])
    file = artifact.path / "program.ir"
    module = parse_module(file.read_text(encoding="utf-8"), str(file))
    checkpoint = open_checkpoint(path)
    reference = clone_module(module)
    notes = bind(reference, checkpoint)
    inputs = _inputs(ids, model.engine.pool.table_width)
    traced, trace = _run_traced(model, model.engine, module, inputs)
    check = OpCheck(reference, checkpoint.load, trace, StoredWeights(module, model.engine.weights), BOUND)
    own = check.run(inputs, PAGE)
    oracle = transformers_logits(path, checkpoint, ids)
    if isinstance(oracle, str):
        notes.append(f"not compared with transformers: {oracle}")
    return Comparison(
        bound=BOUND,
        tokens=len(ids),
        ops=tuple(check.errors),
        near_ties=check.near_ties,
        logits_error=relative_error(traced, own),
        artifact_error=relative_error(logits, traced),
        transformers_error=None if isinstance(oracle, str) else relative_error(logits, oracle),
        notes=tuple(notes),
    )


def _inputs(ids: Sequence[int], table_width: int) -> dict[str, torch.Tensor]:
    """Arguments of a prefill of one sequence that owns the cache's first pages."""

    def i32(values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32)

    order = i32(range(len(ids)))
    return {
        "ids": i32(list(ids)), "seq": torch.zeros_like(order), "pos": order, "pages": i32(range(table_width))[None],
        "starts": i32([0, len(ids)]), "rows": order,
    }  # fmt: skip


def _run_traced(
    model: Model, engine: Engine, module: Module, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, Trace]:
    """Logits f32[T, V] and trace of one call of the traced prefill on the artifact's weights."""
    traced = compile_watched(module, targets.load("cpu"), model.artifact.manifest.limits, "trace")
    phase = traced.phases["prefill"]
    library = Library(traced.library, engine.threads)
    arrays: dict[str, Any] = {}
    for described in phase["entry"]["args"]:
        name, kind, shape = described["name"], described["kind"], tuple(described["shape"])
        arg = Argument(name, kind, np.dtype(described["dtype"]), shape)
        if kind == "input":
            arrays[name] = inputs[name].numpy()
        elif kind == "weight":
            arrays[name] = engine.weights.view(arg)
        else:
            sizes = arg.sizes({"R": len(inputs["rows"]), "T": len(inputs["ids"])})
            size = int(np.prod(sizes, dtype=np.int64)) * arg.dtype.itemsize
            arrays[name] = aligned_zeros(size).view(arg.dtype).reshape(sizes)
    library.use_threads()
    library.function(phase["entry"]["symbol"])(*map(library.tensor, arrays.values()))
    words = torch.from_numpy(arrays["trace"])
    points = {(p["function"], p["layer"], p["op"], p["result"]): words[p["offset"] :] for p in phase["points"]}
    return torch.from_numpy(arrays["logits"]), points
