"""ONNX graphs that moec did not write: nodes run as torch functions, exported and raised like any torch module."""

from moec.frontend.onnx_import.trace import trace_onnx

__all__ = ["trace_onnx"]
