"""SwiGLU with bounded inputs for moec: an op, a pass, a model family, kernels and a target."""

from pathlib import Path

QUIET_CPU = Path(__file__).parent / "targets" / "quiet-cpu.yaml"
