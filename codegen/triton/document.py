"""docs/gpu-kernels.md from the declarations: `python -m moec.codegen.triton.document > docs/gpu-kernels.md`."""

from __future__ import annotations

from moec.codegen.triton.arch import ARCHITECTURES
from moec.codegen.triton.spec import KernelSpec, Tile, registry

PREFACE = """\
# GPU kernels

Generated from the declarations in `codegen/triton/specs/` by `python -m moec.codegen.triton.document`; edit those.

Each kernel is a plain Triton function in `codegen/triton/kernels/` and one declaration (`KernelSpec`): arguments,
compile-time constants, tiles for every architecture and shape class, grid, cost, a reference in torch with the bounds
its results are held to, and the problems it is tested on. The declaration drives

- the test: `pytest tests/triton` runs every kernel in Triton's interpreter against torch in float64;
- compilation: `compile_kernels(instances("sm_90a"))` in `codegen/triton/aot.py` needs no GPU and no driver;
- the launch from the packed cubin: `runtime/cuda/` speaks to the driver and needs neither Triton nor torch;
- the benchmark: `python benchmarks/gpu.py` on a GPU, `python benchmarks/gpu.py --dry-run` anywhere.

## What a compiled kernel is checked for

The tensor instruction of its architecture is there; no spill stores beyond the bytes that its tile lists; shared memory
and registers of a block fit the device; ptxas did not serialise its wgmma. `compile_kernels` raises `CheckFailed` with
the reason, or reports it with `strict=False`.

Results are kept in `$MOEC_CACHE_DIR`, or `~/.cache/moec`, by the hash of source, types, constants, tile, architecture
and Triton's version. The same input gives the same bytes: line information is left out.

## Architectures

{architectures}

gfx942 compiles through the same declarations; its FP8 operands are widened to FP16 in registers, because Triton 3.6 has
no matrix instruction for OCP's E4M3 there. Loading its binaries is not supported yet: `runtime/cuda/` is for NVIDIA.
A kernel with FP8 operands does not run on sm_80; asking for it names the fallback.

## Numbers

FP8 is E4M3 with one scale for 1x128 activations and 128x128 weights, float32 promotion every 128 products (DeepSeek-V3
technical report, arXiv 2412.19437, sec. 3.3). Scales are `amax / 448`; a power-of-two scale is rounded up before the
values are divided by it; a group of zeros has scale 1. Conversions round to nearest even and saturate. A cached FP8
latent row is 656 bytes: 512 values, four float32 scales, 64 BF16 of rotated key.

Row counts are run-time arguments, so one binary serves every batch; what a kernel needs of its sizes is listed with it
and checked when it is asked for.

## Kernels

{index}
"""


def tile(value: Tile) -> str:
    blocks = ", ".join(f"{name} {size}" for name, size in value.constants.items()) or "whole rows"
    spills = f", {value.spills} bytes of spill stores accepted" if value.spills else ""
    return f"{blocks}; {value.num_warps} warps, {value.num_stages} stages{spills}"


def tiles(spec: KernelSpec) -> list[str]:
    """One line for every tile, architectures that share it together."""
    users: dict[str, list[str]] = {}
    for arch, shapes in spec.tiles.items():
        for shape, value in shapes.items():
            users.setdefault(f"{shape}: {tile(value)}", []).append(arch)
    return [f"- {', '.join(archs)}, {text}" for text, archs in users.items()]


def section(spec: KernelSpec) -> str:
    arguments = ", ".join(f"`{name}: {kind}`" for name, kind in spec.signature.items())
    lines = [
        f"### {spec.name}",
        "",
        f"{spec.summary}. Serves {', '.join(f'`{op}`' for op in spec.ops)}; `{spec.function.replace(':', '.py: ')}`.",
        "",
        f"- arguments: {arguments}",
        f"- grid: `{' x '.join(spec.grid)}`",
        f"- work: `{spec.flops}` operations, `{spec.bytes}` bytes",
    ]
    if spec.requires:
        lines.append(f"- needs: {', '.join(f'`{text}`' for text in spec.requires)}")
    if spec.aligned:
        lines.append(f"- multiples of 16: {', '.join(f'`{name}`' for name in spec.aligned)}")
    if spec.fallback:
        lines.append(f"- elsewhere: `{spec.fallback}`")
    return "\n".join([*lines, *tiles(spec)])


def document() -> str:
    """The whole page."""
    rows = [
        f"| {a.name} | {a.tensor_instruction} | {a.shared_bytes // 1024} KiB | {'yes' if a.fp8 else 'no'} |"
        for a in ARCHITECTURES.values()
    ]
    architectures = "\n".join(
        ["| name | tensor instruction | shared memory of a block | FP8 |", "|---|---|---|---|", *rows]
    )
    by_op: dict[str, list[str]] = {}
    for spec in registry().values():
        for op in spec.ops:
            by_op.setdefault(op, []).append(f"`{spec.name}`")
    index = "\n".join(
        ["| IR op | kernels |", "|---|---|", *(f"| `{op}` | {', '.join(n)} |" for op, n in by_op.items())]
    )
    sections = [section(spec) for spec in registry().values()]
    return PREFACE.format(architectures=architectures, index=index) + "\n" + "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    print(document(), end="")
