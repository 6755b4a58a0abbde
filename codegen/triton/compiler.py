"""The process that compiles: one request a line in, one reply a line out, results into the cache.

Started by aot.py as `python -m moec.codegen.triton.compiler`, with the environment that makes cubins reproducible:
Triton reads it when it is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from moec.codegen.triton import cache
from moec.codegen.triton.arch import architecture
from moec.codegen.triton.facts import amd_facts, nvidia_facts

_ADDR_NO_RANDOMIZE = 0x0040000
"""personality(2)."""


def fixed_addresses() -> bool:
    """Gives every process started from here on the same addresses each time; whether the kernel grants it.

    ptxas orders instructions by the addresses of its data: of two runs over one sm_100a assembly the cubins can differ
    in a few words (both right). Where a container forbids the call, artifacts are as right, but not the same bytes.
    """
    return bool(ctypes.CDLL(None).personality(_ADDR_NO_RANDOMIZE) != -1)


def tensor_map(meta: dict[str, Any]) -> dict[str, Any]:
    """How a host makes a descriptor: box, and data type and swizzle as the driver's API numbers them.

    Triton's numbering of the floating-point types differs from CUtensorMapDataType in three places.
    """
    data_type = {8: 10, 9: 8, 10: 9}.get(meta["elem_type"], meta["elem_type"])
    return {
        "box": list(meta["block_size"]),
        "element_bytes": meta["elem_size"],
        "data_type": data_type,
        "swizzle": meta["swizzle"],
    }


def built(request: dict[str, Any]) -> Any:
    """Triton's compiled kernel of a request, with no GPU present."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moec.codegen.triton.spec import load_function

    arch = architecture(request["arch"])
    function = load_function(request["function"], request["text"])
    names = function.arg_names
    signature = {name: request["signature"].get(name, "constexpr") for name in names}
    constants = {name: request["constants"][name] for name in names if signature[name] == "constexpr"}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in request["aligned"]}
    target = GPUTarget(arch.backend, arch.version, arch.warp_size)
    options = {"num_warps": request["num_warps"], "num_stages": request["num_stages"], "enable_fp_fusion": True}
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    return triton.compile(ASTSource(function, signature, constants, attributes), target=target, options=options)


def compile_request(request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Facts and files (binary, assembly) of one kernel."""
    arch = architecture(request["arch"])
    report = io.StringIO()
    started = time.perf_counter()
    with contextlib.redirect_stdout(report):
        compiled = built(request)
    seconds = time.perf_counter() - started
    meta = compiled.metadata
    assembly = compiled.asm["ptx" if arch.nvidia else "amdgcn"]
    binary = compiled.asm["cubin" if arch.nvidia else "hsaco"]
    read = (
        nvidia_facts(assembly, report.getvalue())
        if arch.nvidia
        else amd_facts(assembly, arch.warp_size, meta.num_warps)
    )
    facts = {
        **read,
        "seconds": seconds,
        "symbol": meta.name,
        "shared_bytes": meta.shared,
        "global_scratch": getattr(meta, "global_scratch_size", 0),
        "tensor_maps": [tensor_map(entry) for entry in getattr(meta, "tensordesc_meta", None) or []],
    }
    return facts, {"binary": binary, "assembly": assembly.encode()}


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compiles into the cache; {} or the error in words."""
    from triton.compiler.errors import CompilationError

    try:
        cache.store(folder, request["key"], *compile_request(request))
    except CompilationError as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        return {"error": cause[-1] if cause else type(error).__name__}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
    return {}


def main() -> None:
    """Serves requests until its input ends. The first argument is the cache's folder."""
    folder = Path(sys.argv[1])
    fixed_addresses()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compiler prints must not be taken for a reply
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line), folder)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
