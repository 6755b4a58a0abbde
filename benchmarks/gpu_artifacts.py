"""One preset of every family, compiled for every GPU architecture: `python benchmarks/gpu_artifacts.py --out FILE.md`.

Needs no GPU: whole programs are lowered and their kernels compiled ahead of time (from the cache where they are there).
A row says how many ops and kernels a program has, whether an op lacks a kernel or a kernel an op, what spills, and what
the largest kernel takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import moec
from moec.codegen.triton.fused.groups import VIEWS
from moec.codegen.triton.lower.order import CONTROL
from moec.codegen.triton.program import compiled_program
from moec.errors import MoecError

MODELS = (
    "deepseek-v3", "deepseek-v3.2", "deepseek-v2-lite", "kimi-k2", "moonlight-16b", "mixtral-8x7b", "qwen3-30b-a3b",
    "qwen1.5-moe-a2.7b", "gpt-oss-20b", "llama-4-scout", "llama-3.2-1b", "phi-3.5-moe", "glm-4.5-air",
    "granite-3.0-1b-a400m", "hunyuan-a13b",
)  # fmt: skip
TARGETS = ("h800", "b200", "a100", "mi300x")
HEAD = ("model", "target", "ops", "kernels", "ops without", "kernels without", "TMA", "spills", "registers",
        "shared KiB", "replaced", "s")  # fmt: skip


def launched(steps: list[Any]) -> Iterator[Mapping[str, Any]]:
    """Every step that is no loop."""
    for step in steps:
        yield from launched(step["steps"]) if "repeat" in step else [step]


def row(model: str, target: str) -> tuple[str, ...]:
    """What one program is like. Raises what its compilation raises."""
    began = time.perf_counter()
    plan = moec.trace(model).optimize(target)
    program, compiled = compiled_program(plan.ir, plan.context.target, vars(plan.context.limits))
    done = {(f, i) for e in program.table.entries.values() for f, indices in e.uses.items() for i in indices}
    ops = [(f.name, i, op) for f in plan.ir.functions.values() for i, op in enumerate(f.ops)]
    without = sum((f, i) not in done and op.name not in (*CONTROL, *VIEWS) for f, i, op in ops)
    used = {s["kernel"] for p in program.phases.values() for s in launched(p.steps) if "kernel" in s}
    # The next token is drawn by the engine, after the program's last op.
    used |= {n for n, e in program.table.entries.items() if e.instance.spec.ops[0].startswith("sample.")}
    spills = [f"{k.instance.name} {k.facts['spill_stores']} B" for k in compiled if k.facts["spill_stores"]]
    return (
        model, target, str(len(ops)), str(len(compiled)), str(without), str(len(set(program.table.entries) - used)),
        str(sum(bool(k.facts["tensor_maps"]) for k in compiled)), ", ".join(spills) or "0",
        str(max(k.facts["registers"] for k in compiled)), str(max(k.facts["shared_bytes"] for k in compiled) // 1024),
        str(len(program.table.refused)), f"{time.perf_counter() - began:.0f}",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--target", action="append", help=f"default: {', '.join(TARGETS)}")
    parser.add_argument("--out", type=Path, help="append the rows to this Markdown file")
    options = parser.parse_args()
    failed = 0
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    print("\n".join(lines), flush=True)
    for model in options.model or MODELS:
        for target in options.target or TARGETS:
            try:
                cells = row(model, target)
            except MoecError as error:
                failed += 1
                cells = (model, target, str(error), *[""] * (len(HEAD) - 3))
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if options.out:
        before = options.out.read_text() if options.out.exists() else ""
        options.out.write_text(before + "\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
