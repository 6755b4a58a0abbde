"""Packed GPU kernels, launched through the CUDA driver: needs the driver library and nothing else."""

from moec.runtime.cuda.driver import Driver
from moec.runtime.cuda.kernel import Kernel, load_kernels

__all__ = ["Driver", "Kernel", "load_kernels"]
