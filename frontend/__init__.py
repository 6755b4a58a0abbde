"""From a preset, a Hugging Face folder or a Python definition to the IR."""

from moec.frontend.source import ModelSource, find_model
from moec.frontend.trace import trace_model

__all__ = ["ModelSource", "find_model", "trace_model"]
