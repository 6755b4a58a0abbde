"""What a compiled kernel is like, read from its assembly and from the assembler's report."""

from __future__ import annotations

import re
from typing import Any

from moec.codegen.triton.arch import Architecture

# 32-bit registers of a multiprocessor, and the step in which a thread gets them: compute capability 8.0 to 10.0.
REGISTER_FILE = 64 * 1024
REGISTER_STEP = 8
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05": r"\btcgen05\.mma\.",
    "mma": r"(?<![a-z_.])mma\.sync\.",
    "mfma": r"\bv_mfma_",
}


def number(pattern: str, text: str) -> int:
    """The number that `pattern` captures, 0 when it does not occur."""
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def tensor_instruction(assembly: str) -> str | None:
    """The tensor instruction in the assembly, the newest first; None without one."""
    return next((name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, assembly)), None)


def nvidia_facts(ptx: str, report: str) -> dict[str, Any]:
    """From PTX and what `ptxas -v` prints."""
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    return {
        "registers": number(r"Used (\d+) registers", report),
        "spill_stores": number(r"(\d+) bytes spill stores", report),
        "serialised": "are serialized" in report,
        "threads": number(r"\.reqntid (\d+)", ptx),
        "parameters": entry.group(1).count(".param") if entry else 0,
        "tensor_instruction": tensor_instruction(ptx),
    }


def amd_facts(assembly: str, warp_size: int, num_warps: int) -> dict[str, Any]:
    """From the AMD GCN assembly's metadata; spills are counted in registers there, of four bytes a lane."""
    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)", assembly),
        "spill_stores": 4 * number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        "serialised": False,
        "threads": warp_size * num_warps,
        "parameters": 0,
        "tensor_instruction": tensor_instruction(assembly),
    }


def problems(facts: dict[str, Any], arch: Architecture, tensor_core: bool, spills: int, parameters: int) -> list[str]:
    """What is wrong with a compiled kernel, in words; nothing when it is as it should be."""
    found = []
    if tensor_core and facts["tensor_instruction"] != arch.tensor_instruction:
        has = facts["tensor_instruction"] or "no tensor instruction"
        found.append(f"{arch.tensor_instruction} expected, {has} found")
    if facts["spill_stores"] > spills:
        found.append(f"{facts['spill_stores']} bytes of spill stores, {spills} listed")
    if facts["shared_bytes"] > arch.shared_bytes:
        found.append(f"{facts['shared_bytes']} bytes of shared memory, {arch.shared_bytes} are there")
    registers = -(-facts["registers"] // REGISTER_STEP) * REGISTER_STEP * facts["threads"]
    if arch.nvidia and registers > REGISTER_FILE:
        found.append(f"{registers} registers for a block, {REGISTER_FILE} are there")
    if arch.nvidia and facts["parameters"] != parameters:
        found.append(f"{facts['parameters']} parameters, the signature makes {parameters}")
    if facts["serialised"]:
        found.append("ptxas serialises its wgmma")
    return found
