"""What is known of GPU kernels without a GPU: what the compiler says of each, and predicted times."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from gpu_model import BATCHES, compiled_for, predicted_step, sized
from gpu_predict import SHEETS, predicted_us
from gpu_shapes import published
from gpu_tables import table

from moec.codegen.triton import aot
from moec.codegen.triton.spec import instances, registry
from moec.targets import load


def dry_run(architectures: list[str], cold: bool, jobs: int) -> dict[str, Any]:
    """Compiles everything and prints one table per architecture."""
    result: dict[str, Any] = {"measured": False}
    for arch in architectures:
        target = load(SHEETS[arch])
        with tempfile.TemporaryDirectory() as empty, cache_in(empty if cold else None):
            started = time.perf_counter()
            _, program, of_program = compiled_for(target)
            seconds = time.perf_counter() - started
            others = [*instances(arch), *published(target)]
            compiled = aot.compile_kernels(others, jobs=jobs, strict=False)
        named = [(sized(program, name), k) for name, k in zip(program.table.entries, of_program, strict=True)]
        named += [(k.instance, k) for k in compiled]
        rows = [
            (*facts_of(k), f"{k.seconds:.2f}", f"{predicted_us(i, target):.1f}", "; ".join(k.problems()) or "ok")
            for i, k in named
        ]
        head = ("kernel", "instruction", "tile", "registers", "spill bytes", "shared bytes", "compile s",
                "PREDICTED us", "checks")  # fmt: skip
        cached = sum(k.cached for k in of_program)
        print(
            f"\n{arch}: {len(of_program)} kernels of four DeepSeek-V3 layers, both phases, in {seconds:.1f} s "
            f"({cached} from the cache), and {len(compiled)} others; predicted for {target.name}"
        )
        print(table(head, rows))
        steps = {batch: predicted_step(target, batch) for batch in BATCHES}
        print("decode of 4 DeepSeek-V3 layers, context 4096, PREDICTED: " + ", ".join(
            f"batch {batch} {us / 1e3:.2f} ms ({count} launches)" for batch, (us, count) in steps.items()
        ))  # fmt: skip
        left_out = sorted(s.name for s in registry().values() if arch not in s.tiles)
        print(f"not on {arch}: {', '.join(left_out) or 'none'}")
        result[arch] = {
            "seconds": seconds,
            "predicted_decode_us": {str(batch): us for batch, (us, _) in steps.items()},
            "kernels": [{**k.record(), "compile_s": k.seconds, "predicted_us": predicted_us(i, target),
                         "problems": k.problems()} for i, k in named],
        }  # fmt: skip
    return result


def facts_of(k: aot.Compiled) -> tuple[str, ...]:
    """Name, instruction, tile and what the compiler tells of a kernel."""
    tile = k.instance.tile
    blocks = " ".join(f"{n}={v}" for n, v in tile.constants.items() if n != "GROUP_M")
    spilled = f"{k.facts['spill_stores']}{' listed' if k.spills_listed else ''}"
    return (
        k.instance.name, k.facts["tensor_instruction"] or "-", f"{blocks} {tile.num_warps}w {tile.num_stages}s".strip(),
        str(k.facts["registers"]), spilled, str(k.facts["shared_bytes"]),
    )  # fmt: skip


@contextlib.contextmanager
def cache_in(folder: str | None) -> Iterator[None]:
    """Compiled kernels are kept in `folder` meanwhile."""
    before = os.environ.get("MOEC_CACHE_DIR")
    if folder is not None:
        os.environ["MOEC_CACHE_DIR"] = folder
    yield
    if folder is not None:
        os.environ.pop("MOEC_CACHE_DIR")
        os.environ.update({} if before is None else {"MOEC_CACHE_DIR": before})
