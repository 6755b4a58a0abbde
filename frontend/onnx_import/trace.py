"""`moec.trace("model.onnx")`: an ONNX graph of a language model as IR."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from moec.errors import printable
from moec.frontend.onnx_import.files import OnnxError, read_model
from moec.frontend.onnx_import.module import OnnxModule
from moec.frontend.torch_import import TorchSource, trace_module
from moec.frontend.torch_import.exported import example_ids
from moec.ir import Module

SETTINGS = ("config.json", "genai_config.json")
"""Files beside a graph that tell how many positions it has, and where a text ends."""


def trace_onnx(path: Path) -> tuple[TorchSource, Module]:
    """The graph's IR with `@prefill` and `@decode`. Raises OnnxError, NotRaised or NotExportable."""
    model = read_model(path)
    if any(p.key == "moec.weights" for p in model.metadata_props):
        message = "was exported by moec: its program is read by `moec ir show`; compile the model that it came from"
        raise OnnxError(file=path, message=message)
    module = OnnxModule(model, path)
    settings = _settings(path.parent)
    module.config = settings  # type: ignore[assignment]
    source, ir = trace_module(module, (example_ids(),))
    name = re.sub(r"\W", "_", printable(path.stem if path.stem != "model" else path.resolve().parent.name))
    ir.name = name
    return replace(source, name=name, folder=path.parent), ir


class _Settings:
    max_position_embeddings: int | None = None
    eos_token_id: int | list[int] | None = None


def _settings(folder: Path) -> _Settings:
    """What the files beside the graph say; nothing where there are none."""
    found = _Settings()
    for name in SETTINGS:
        try:
            raw: Any = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        raw = raw.get("model", raw) if isinstance(raw, dict) else {}
        positions = raw.get("max_position_embeddings") or raw.get("context_length")
        if isinstance(positions, int) and positions > 0:
            found.max_position_embeddings = found.max_position_embeddings or positions
        ends = raw.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        if all(isinstance(e, int) for e in ends):
            found.eos_token_id = found.eos_token_id or ends
    return found
