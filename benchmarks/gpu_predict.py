"""Predicted times of kernels: bounds from the data sheet, nothing measured."""

from __future__ import annotations

from moec.codegen.triton.spec import Instance
from moec.targets import Target, load

# The target whose data sheet stands for an architecture in predictions.
SHEETS = {"sm_80": "a100", "sm_90a": "h800", "sm_100a": "b200", "gfx942": "mi300x"}


def element(instance: Instance) -> str:
    """The type in which the kernel multiplies."""
    fp8 = any("fp8" in kind for name, kind in instance.signature.items() if name[0] in "ab")
    return "fp8" if fp8 else "bf16"


def predicted_us(instance: Instance, target: Target | None = None) -> float:
    """The bound from rates and bandwidth of the data sheet, plus one launch; no efficiency is assumed."""
    device = (target or load(SHEETS[instance.arch])).device
    rate = device.matrix_rate(element(instance)) if instance.spec.tensor_core else device.vector_rate
    return 1e6 * max(instance.flops() / rate, instance.bytes() / device.memory_bandwidth) + device.launch_us


def sizes(instance: Instance) -> str:
    """The dims that the kernel's cost depends on."""
    text = instance.spec.flops + instance.spec.bytes
    used = "".join(c if c.isalnum() or c == "_" else " " for c in text).split()
    return " ".join(f"{n}={v}" for n, v in instance.dims.items() if n in used)
