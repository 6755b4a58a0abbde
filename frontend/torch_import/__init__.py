"""Modules of torch that nobody declared: exported, raised to the ops of the IR, rolled into layers."""

from moec.frontend.torch_import.trace import TorchSource, trace_module

__all__ = ["TorchSource", "trace_module"]
