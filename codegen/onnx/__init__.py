"""ONNX out: the IR as local functions over standard ops."""
