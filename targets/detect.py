"""The CPU of this machine as leaves of a target file: read from the system, or assumed and marked so."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from moec.targets.document import Leaf, Value
from moec.targets.read_bandwidth import measure_read_bandwidth

# Read bandwidth that one core sustains, and what a socket's memory controllers give at most: typical of
# recent server parts, replaced by a measurement with `moec targets show cpu --measure`.
_ASSUMED_PER_CORE: Final = 12e9
_ASSUMED_SOCKET: Final = 200e9
_ASSUMED_CLOCK: Final = 2.5e9
_X86_LEVELS: Final = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx2", "fma", "bmi1", "bmi2", "f16c"}),
    ("x86-64-v2", {"sse4_2", "popcnt", "ssse3"}),
)
_X86_FEATURES: Final = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
)  # fmt: skip
_ARM_FEATURES: Final = ("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme")


@dataclass(frozen=True)
class Cpu:
    """What is known of the CPU; sizes in bytes, clock in Hz, bandwidth in bytes/s."""

    model: str
    arch: str
    isa: tuple[str, ...]
    cores: int
    clock: float
    clock_source: str
    vector_bits: int
    memory_bytes: float
    cache_bytes: dict[str, float]
    bandwidth: float
    bandwidth_source: str


@lru_cache(maxsize=2)
def detect(measure: bool = False) -> Cpu:
    """The CPU that this process may use; with `measure`, its memory read bandwidth is measured (a second)."""
    info = _read("/proc/cpuinfo")
    flags = set(_line_of(info, "flags|Features").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    clock, clock_source = _clock(info)
    if measure:
        bandwidth, source = (
            measure_read_bandwidth(cores),
            f"measured here: {cores} threads reading 256 MiB each",
        )
    else:
        bandwidth = min(cores * _ASSUMED_PER_CORE, _ASSUMED_SOCKET)
        source = "assumed: 12 GB/s a core, at most 200 GB/s (`moec targets show cpu --measure` measures it)"
    return Cpu(
        model=_line_of(info, "model name") or platform.processor() or platform.machine(),
        arch=_arch(flags),
        isa=tuple(f for f in (*_X86_FEATURES, *_ARM_FEATURES) if f in flags),
        cores=cores,
        clock=clock,
        clock_source=clock_source,
        vector_bits=512 if "avx512f" in flags else 256 if "avx2" in flags else 128,
        memory_bytes=_memory_bytes(),
        cache_bytes=_caches(cores),
        bandwidth=bandwidth,
        bandwidth_source=source,
    )


def detected_leaves(measure: bool = False) -> dict[str, Leaf]:
    """The fields of a target file that describe this machine's CPU."""
    cpu = detect(measure)
    lanes = cpu.vector_bits / 32
    fp32 = cpu.cores * cpu.clock * lanes * 4
    assumed = "detected cores, clock and vector width; two fused multiply-adds a cycle assumed"
    rows: list[tuple[str, Value, str]] = [
        ("kind", "cpu", ""),
        ("description", f"this machine: {cpu.model}, {cpu.cores} cores", ""),
        ("device.model", cpu.model, ""),
        ("device.arch", cpu.arch, ""),
        ("device.isa", cpu.isa, ""),
        ("device.cores", float(cpu.cores), "detected: cores that this process may use"),
        ("device.clock", cpu.clock, cpu.clock_source),
        ("device.vector_bits", float(cpu.vector_bits), "detected: instruction set flags"),
        ("device.matrix.fp32", fp32, assumed),
        ("device.vector.fp32", fp32, assumed),
        ("device.memory.capacity", cpu.memory_bytes, "detected: memory of the machine or its control group"),
        ("device.memory.bandwidth", cpu.bandwidth, cpu.bandwidth_source),
        ("device.fp8.matrix", False, ""),
        ("device.launch", 2e-6, "assumed: waking a pool of threads"),
    ]
    if "avx512_bf16" in cpu.isa:
        doubled = "detected: AVX-512 BF16 dot products do two products where FP32 does one"
        rows.append(("device.matrix.bf16", 2 * fp32, doubled))
    if "amx_bf16" in cpu.isa:
        tiles = "detected: AMX, a product of 16 x 16 x 32 numbers in 16 cycles: 512 multiply-adds a cycle and core"
        rows.append(("device.matrix.bf16", cpu.cores * cpu.clock * 1024, tiles))
    rows.extend((f"device.cache.{k}", size, "detected: /sys cache sizes") for k, size in cpu.cache_bytes.items())
    return {path: Leaf(value, source, "this-machine", 1) for path, value, source in rows}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _line_of(text: str, key: str) -> str:
    found = re.search(rf"^(?:{key})\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _clock(info: str) -> tuple[float, str]:
    limit = _read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    if limit.isdigit():
        return int(limit) * 1e3, "detected: greatest clock of cpu0 (cpufreq)"
    if mhz := _line_of(info, "cpu MHz"):
        return float(mhz) * 1e6, "detected: current clock (/proc/cpuinfo)"
    return _ASSUMED_CLOCK, "assumed: the system does not say"


def _arch(flags: set[str]) -> str:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return next((level for level, needed in _X86_LEVELS if needed <= flags), "x86-64")
    return platform.machine() or "unknown"


def _memory_bytes() -> float:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return float(min(total, int(limit))) if limit.isdigit() else float(total)


def _caches(cores: int) -> dict[str, float]:
    """Level-1 data cache of a core; the others summed over the cores in use."""
    found: dict[str, float] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(index / entry)).strip() for entry in ("level", "type", "size"))
        units = {"K": 2**10, "M": 2**20, "G": 2**30}
        if kind == "Instruction" or not size or size[-1] not in units:
            continue
        share = _count(_read(str(index / "shared_cpu_list")).strip())
        copies = 1 if level == "1" else -(-cores // share)
        found[f"l{level}"] = float(int(size[:-1]) * units[size[-1]] * copies)
    return {k: v for k, v in found.items() if k in ("l1", "l2", "l3")}


def _count(cpus: str) -> int:
    total = 0
    for part in filter(None, cpus.split(",")):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return max(total, 1)
