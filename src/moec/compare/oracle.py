"""Logits of transformers on the same folder: an implementation that shares nothing with this one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from moec.frontend.checkpoint import Checkpoint


def transformers_logits(folder: Path, checkpoint: Checkpoint, ids: Sequence[int]) -> torch.Tensor | str:
    """Logits f32[T, V] in FP32 of the model in `folder`, or why there are none."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if not (folder / "config.json").is_file():
        return "the folder holds no config.json"
    needed = 4 * sum(prod(entry.shape) for entry in checkpoint.tensors.values())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        return f"the model takes {needed / 1e9:.1f} GB in FP32, {free / 1e9:.1f} GB are free"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            # The grouped product of torch takes no widths that are not multiples of 16 bytes.
            experts_implementation="eager",
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        return f"transformers cannot load the folder ({str(error).strip().partition(chr(10))[0]})"
    with torch.no_grad():
        logits = model.eval()(torch.tensor([list(ids)])).logits
    return logits[0]  # type: ignore[no-any-return]
