"""Runs compiled artifacts: `load(path)` gives a `Model` with `logits`, `generate` and `as_module`."""

from moec.runtime.artifact import Artifact, open_artifact
from moec.runtime.model import Model, load
from moec.runtime.sampling import Sampling

__all__ = ["Artifact", "Model", "Sampling", "load", "open_artifact"]
