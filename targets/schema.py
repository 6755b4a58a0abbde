"""What a target is: the dataclasses that the rest of moec reads. Base units unless named otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from moec.targets.errors import NoLink, WrongRanks

Kind = Literal["cpu", "cuda", "rocm"]

# What a type is computed in when the device has no matrix units for it (weights are widened in registers).
_WIDENED = {"fp4": "fp8", "fp8": "bf16", "bf16": "fp32", "fp16": "fp32", "tf32": "fp32"}


@dataclass(frozen=True)
class Fp8:
    """FP8 abilities: `matrix` units or not, element and scale formats, bits of the accumulator."""

    matrix: bool
    formats: tuple[str, ...] = ()
    scale_formats: tuple[str, ...] = ()
    accumulate_bits: int = 32


@dataclass(frozen=True)
class Device:
    """One accelerator or CPU. Rates in FLOP/s, sizes in bytes, bandwidths in bytes/s, clock in Hz."""

    model: str
    arch: str
    isa: tuple[str, ...]
    cores: int
    """SMs of an NVIDIA GPU, compute units of an AMD GPU, cores of a CPU."""
    clock: float
    vector_bits: int
    matrix_rates: Mapping[str, float]
    """Dense peak per element type: bf16, fp16, tf32, fp32, fp8, int8, fp4."""
    vector_rate: float
    """FP32 peak outside the matrix units."""
    memory_bytes: float
    memory_bandwidth: float
    cache_bytes: Mapping[str, float]
    """`l1`, `l2`, `l3` where the device has them; l1 is per core, the others are for the device."""
    shared_bytes: float
    """Shared memory that one block may use; 0 where there is none."""
    fp8: Fp8
    launch_us: float
    """Time from one kernel's end to the next one's start in a captured graph, microseconds."""
    host_bandwidth: float
    """One way between device and host memory; 0 where they are the same memory."""

    def compute_type(self, dtype: str) -> str:
        """The type that `dtype` is multiplied in: itself, or the next wider one with a rate of its own."""
        while dtype not in self.matrix_rates and dtype in _WIDENED:
            dtype = _WIDENED[dtype]
        return dtype

    def matrix_rate(self, dtype: str) -> float:
        """Dense peak FLOP/s for `dtype`, or for the next wider type (FP8 on an A100 runs as BF16)."""
        return self.matrix_rates.get(self.compute_type(dtype), self.vector_rate)


@dataclass(frozen=True)
class Link:
    """A link, one way. `bandwidth` is per device (scale-up) or per NIC (scale-out); `latency` in seconds."""

    name: str
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Node:
    """Devices joined by the scale-up link; `nics` scale-out adapters serve all of them."""

    devices: int
    scale_up: Link | None
    scale_out: Link | None
    nics: int

    @property
    def scale_out_per_device(self) -> float:
        """Scale-out bytes/s that one device has when all of them send, one way; 0 without NICs."""
        return 0.0 if self.scale_out is None else self.scale_out.bandwidth * self.nics / self.devices


@dataclass(frozen=True)
class TopologyChoice:
    """The scale-out network: a kind of `moec.targets.topology`, with the ports of its switches."""

    kind: str
    ports: int
    planes: int = 1


@dataclass(frozen=True)
class Cluster:
    """`ranks` devices in use, and the network that joins their nodes."""

    ranks: int
    topology: TopologyChoice | None = None


@dataclass(frozen=True)
class Parameter:
    """A number of the cost model: `physical` (a data sheet could give it) or `effective` (only fitted)."""

    value: float
    kind: Literal["physical", "effective"]
    source: str


@dataclass(frozen=True)
class Target:
    """A hardware description: one device, its node, its cluster, and the fitted numbers of the cost model."""

    name: str
    kind: Kind
    device: Device
    node: Node
    cluster: Cluster
    description: str = ""
    calibration: Mapping[str, Parameter] = field(default_factory=dict, repr=False)
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Where each number comes from, by its path in the file (`device.memory.bandwidth`)."""
    load: float = 0.0
    """Share of the time around a call in which matrix units are busy: 0 for a call alone, set for calls of a step."""

    @cached_property
    def families(self) -> Mapping[str, Mapping[str, float]]:
        """The calibration's values by family and name: `families["gemm_bf16"]["floor"]`."""
        found: dict[str, dict[str, float]] = {}
        for path, parameter in self.calibration.items():
            _, family, name = path.split(".")
            found.setdefault(family, {})[name] = parameter.value
        return found

    @property
    def nodes(self) -> int:
        """Nodes that the cluster's ranks take up."""
        return -(-self.cluster.ranks // self.node.devices)

    def with_ranks(self, ranks: int) -> Target:
        """The same hardware with another number of devices; WrongRanks when they do not fill whole nodes."""
        per_node = self.node.devices
        reason = None
        if ranks < 1:
            reason = "at least one is needed"
        elif ranks > per_node and ranks % per_node:
            near = ranks // per_node * per_node
            reason = f"beyond one node use a multiple of {per_node}, such as {near} or {near + per_node}"
        elif ranks > per_node and self.node.scale_out is None:
            reason = "its file has no node.scale_out link"
        if reason:
            raise WrongRanks(name=self.name, ranks=ranks, devices=per_node, reason=reason)
        return replace(self, cluster=replace(self.cluster, ranks=ranks))

    def without_cores(self, taken: int) -> Target:
        """The target as kernels see it while others keep `taken` of its cores: less compute, the same memory."""
        device = self.device
        left = max(1, device.cores - taken)
        share = left / device.cores
        rates = {name: rate * share for name, rate in device.matrix_rates.items()}
        fewer = replace(device, cores=left, matrix_rates=rates, vector_rate=device.vector_rate * share)
        return replace(self, device=fewer)

    def scale_up(self) -> Link:
        """The link inside a node; NoLink when the target has none."""
        if self.node.scale_up is None:
            raise NoLink(name=self.name, link="scale-up", field="scale_up")
        return self.node.scale_up

    def scale_out(self) -> Link:
        """The link between nodes; NoLink when the target has none."""
        if self.node.scale_out is None:
            raise NoLink(name=self.name, link="scale-out", field="scale_out")
        return self.node.scale_out
