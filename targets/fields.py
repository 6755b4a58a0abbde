"""The fields of a target file: one table that reading, checking, printing and the documentation share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Form = Literal["number", "text", "words", "flag"]

ELEMENT_TYPES: Final = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4")
FP8_FORMATS: Final = ("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz")
SCALE_FORMATS: Final = ("f32", "ue8m0")
KINDS: Final = ("cpu", "cuda", "rocm")
TOPOLOGIES: Final = ("fat-tree-2", "fat-tree-3", "multi-plane-fat-tree-2", "slim-fly", "dragonfly")


@dataclass(frozen=True)
class Field:
    """One entry of a target file. `low` and `high` bound what is plausible, in base units."""

    path: str
    doc: str
    form: Form = "number"
    dimension: str = "count"
    low: float = 0.0
    high: float = float("inf")
    required: bool = False
    choices: tuple[str, ...] = ()

    @property
    def counted(self) -> str:
        """The word after a count: `8 NIC`."""
        return {"nics": "NIC", "cores": "core"}.get(last := self.path.rpartition(".")[2], last.removesuffix("s"))


def _number(path: str, dimension: str, low: float, high: float, doc: str, required: bool = False) -> Field:
    return Field(path, doc, "number", dimension, low, high, required)


_MATRIX = tuple(
    _number(f"device.matrix.{t}", "rate", 1e9, 1e18, f"dense peak for {t} operands, without sparsity")
    for t in ELEMENT_TYPES
)

FIELDS: Final[dict[str, Field]] = {
    f.path: f
    for f in (
        Field("description", "one line for `moec targets list`", "text"),
        Field("kind", "what runs there: cpu, cuda or rocm", "text", required=True, choices=KINDS),
        Field("device.model", "the part's full name", "text", required=True),
        Field(
            "device.arch",
            "architecture for the code generator (sm_90a, gfx942, x86-64-v3)",
            "text",
            required=True,
        ),
        Field("device.isa", "instruction set features, for CPUs", "words"),
        _number("device.cores", "count", 1, 1e5, "SMs, compute units or cores", True),
        _number("device.clock", "frequency", 1e8, 1e10, "clock under load", True),
        _number("device.vector_bits", "bits", 32, 4096, "width of one vector register (a warp's row on a GPU)"),
        *_MATRIX,
        _number("device.vector.fp32", "rate", 1e8, 1e16, "FP32 peak outside the matrix units", True),
        _number("device.memory.capacity", "bytes", 1e8, 1e14, "size of the device's memory", True),
        _number("device.memory.bandwidth", "bandwidth", 1e9, 1e14, "peak of the device's memory", True),
        _number("device.cache.l1", "bytes", 1e3, 1e8, "first-level cache of one core"),
        _number("device.cache.l2", "bytes", 1e4, 1e10, "second-level cache of the device"),
        _number("device.cache.l3", "bytes", 1e5, 1e11, "last-level cache of the device"),
        _number("device.shared", "bytes", 1e3, 1e8, "shared memory that one block may use"),
        Field("device.fp8.matrix", "whether the matrix units take FP8", "flag", required=True),
        Field("device.fp8.formats", "FP8 element formats", "words", choices=FP8_FORMATS),
        Field("device.fp8.scale_formats", "formats of block scales", "words", choices=SCALE_FORMATS),
        _number("device.fp8.accumulate_bits", "bits", 8, 64, "width of the FP8 accumulator"),
        _number("device.launch", "time", 1e-9, 1e-2, "from one kernel to the next in a captured graph", True),
        _number("device.host.bandwidth", "bandwidth", 1e8, 1e13, "between device and host memory, one way"),
        _number("node.devices", "count", 1, 1e4, "devices joined by the scale-up link"),
        Field("node.scale_up.name", "name of the link", "text"),
        _number("node.scale_up.bandwidth", "bandwidth", 1e9, 1e14, "per device, one way"),
        _number("node.scale_up.latency", "time", 1e-8, 1e-3, "end to end, small message"),
        Field("node.scale_out.name", "name of the network", "text"),
        _number("node.scale_out.nics", "count", 1, 1e3, "network adapters of a node"),
        _number("node.scale_out.bandwidth", "bandwidth", 1e8, 1e13, "per adapter, one way"),
        _number("node.scale_out.latency", "time", 1e-8, 1e-3, "end to end across a leaf switch, small message"),
        _number("cluster.ranks", "count", 1, 1e7, "devices in use"),
        Field("cluster.topology.kind", "how the nodes are joined", "text", choices=TOPOLOGIES),
        _number("cluster.topology.ports", "count", 4, 4096, "ports of a switch"),
        _number("cluster.topology.planes", "count", 1, 64, "independent planes"),
    )
}
"""Path in the file -> what may stand there."""

TOGETHER: Final = (
    ("node.scale_up.bandwidth", ("node.scale_up.latency",)),
    ("node.scale_out.bandwidth", ("node.scale_out.latency", "node.scale_out.nics")),
    ("cluster.topology.kind", ("cluster.topology.ports",)),
)
"""When the first is given, so must be the others."""
