"""What can go wrong when GPU kernels are chosen and compiled: one class per mistake."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.errors import InputError, MoecError

if TYPE_CHECKING:
    from moec.codegen.triton.spec import Instance


class UnknownKernel(InputError):
    template = "no GPU kernel is named '{name}'{hint}"


class UnknownArchitecture(InputError):
    template = "architecture '{arch}' has no GPU kernels{hint}"


class UnsupportedKernel(InputError):
    template = "kernel '{name}' does not run on {arch}: {reason}; use {fallback} there"


class UnknownShapeClass(InputError):
    template = "kernel '{name}' has no tile for shape class '{shape}' on {arch}{hint}"


class UnmetRequirement(InputError):
    template = "kernel '{name}' needs {requirement}, which does not hold for {values}"


class NoKernel(InputError):
    template = "no GPU kernel for {op}: {reason}"


class TritonMissing(MoecError):
    template = "compiling GPU kernels needs the package triton 3.6.0: pip install 'moec[gpu]'"


class CompileFailed(MoecError):
    template = "kernel '{name}' does not compile for {arch}: {reason}"


class CheckFailed(MoecError):
    instances: list[Instance]
    """Every kernel that failed; the message names the first."""
    template = "compiled kernel '{name}' for {arch} fails its checks: {problems}"
