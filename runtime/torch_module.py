"""A torch.nn.Module around a compiled model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moec.runtime.model import Model


class ArtifactModule(torch.nn.Module):
    """Maps int64[B, T] token ids to logits f32[B, T, V] on the CPU; it has no parameters and no gradients."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits by the artifact's kernels; raises as `Model.logits`."""
        return torch.from_numpy(self.model.logits(input_ids.detach().cpu().numpy()))
