"""What keeps a packed kernel from running: one class per cause, one line each."""

from __future__ import annotations

from moec.errors import InputError, MoecError


class NoDriver(InputError):
    template = "no CUDA driver here ({reason}): run on a machine with an NVIDIA GPU, or compile for --target cpu"


class NoDevice(InputError):
    template = "no CUDA device {ordinal}: {count} found; set CUDA_VISIBLE_DEVICES or use another machine"


class DriverTooOld(InputError):
    template = (
        "the CUDA driver is too old: it speaks CUDA {have}, the kernels need {need}; install a newer NVIDIA driver"
    )


class CubinTooNew(InputError):
    template = "kernel '{name}': this CUDA driver ({have}) does not read its cubin; install a newer NVIDIA driver"


class WrongArchitecture(InputError):
    template = "kernel '{name}' is built for {arch}, this device is {device}: compile again with a target of its kind"


class OutOfMemory(MoecError):
    template = "not enough GPU memory for {what}: {wanted} bytes wanted, {free} of {total} free"


class OutOfMemoryIn(MoecError):
    template = "not enough GPU memory: {call} needs more than the {free} of {total} bytes that are free"


class NoHostMemory(MoecError):
    template = "the system gives no {size} bytes of page-locked memory, through which results come from the GPU"


class BadArguments(InputError):
    template = "kernel '{name}': {reason}"


class DamagedKernel(InputError):
    template = "kernel '{name}': {reason}; write the artifact again"


class DriverFailed(MoecError):
    template = "CUDA driver: {call} failed with {error}"
