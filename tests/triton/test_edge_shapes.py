"""Which edges the declared problems reach, read off the arguments themselves: a new kernel without them fails here.

Generated kernels need no list: each is run at one token, a ragged block and several, and with every load of experts
(`test_generated_kernels.py`), on operands that hold rows of zeros, outliers and subnormals.
`python tests/triton/test_edge_shapes.py` prints the table of kernels by edges.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moec.codegen.triton.problem import make
from moec.codegen.triton.spec import KernelSpec, registry
from moec.codegen.triton.specs.routing import router

TINY = {torch.float32: 1.17e-38, torch.bfloat16: 1.17e-38, torch.float8_e4m3fn: 1.55e-2}
"""Smallest normal numbers."""


def wanted(spec: KernelSpec) -> set[str]:
    """The edges that a kernel of these arguments must be run at."""
    names, numbers = set(spec.signature), {n for n, t in spec.signature.items() if not t.startswith("*i")}
    edges = {"one row"}
    if names & {"length_ptr", "start_ptr", "k_start_ptr", "pos_ptr"}:
        edges |= {"length 1", "length 4097", "ragged lengths"}
    if "count_ptr" in names:
        edges |= {"an empty expert", "all to one expert"}
    if numbers & {"cache_ptr", "latent_ptr", "kv_ptr", "key_ptr", "x_ptr", "logit_ptr"}:
        edges |= {"zeros", "subnormals"}
    return edges


def reached(arguments: dict[str, Any]) -> set[str]:
    """The edges of one problem."""
    found = set()
    lengths: list[int] = []
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        if name in ("start_ptr", "k_start_ptr"):
            lengths += value.diff().tolist()
        elif name in ("length_ptr", "pos_ptr"):
            # Beside chosen positions a length is the token's position.
            before = name == "pos_ptr" or ("chosen_ptr" in arguments and "seq_ptr" in arguments)
            lengths += (value + before).tolist()
        elif value.is_floating_point() and value.dim() > 1 and value.dtype in TINY:
            rows = value.float().flatten(1).nan_to_num(1.0)
            magnitude = rows.abs().amax(1)
            found |= {"zeros"} if bool((magnitude == 0).any()) else set()
            small = (rows != 0) & (rows.abs() < TINY[value.dtype])
            found |= {"subnormals"} if bool(small.any()) else set()
    if 1 in lengths:
        found |= {"length 1", "one row"}
    if 4097 in lengths:
        found.add("length 4097")
    if any(n % 64 for n in lengths) and len(set(lengths)) > 1:
        found.add("ragged lengths")
    if "count_ptr" in arguments and "source_ptr" in arguments:
        count = arguments["count_ptr"].view(-1, arguments["count_ptr"].shape[-1]).sum(0)
        found |= {"an empty expert"} if bool((count == 0).any()) else set()
        found |= {"all to one expert"} if int((count > 0).sum()) == 1 else set()
        found |= {"one row"} if int(count.sum()) == 1 else set()
    return found


ROUTERS = {s.name: s for s in (router(*flags) for flags in itertools.product((True, False), repeat=4))}
"""Of gates with other attributes: declared when a program asks for one."""
KERNELS = {**ROUTERS, **registry()}


def edges_of(spec: KernelSpec) -> set[str]:
    """All edges that the cases of a kernel reach."""
    arch, found = next(iter(spec.tiles)), set[str]()
    for case in spec.cases:
        problem = make(spec, case, arch)
        arguments = spec.build(problem)
        found |= reached(arguments)
        rows = [problem.instance.dims[n] for n in ("T", "M", "B", "ROWS") if n in problem.instance.dims]
        found |= {"one row"} if 1 in rows else set()
        if "count_ptr" in arguments and "index_ptr" in arguments:
            # A router counts what it has chosen: the reference tells.
            expected = spec.reference(problem, arguments)
            if "count_ptr" in expected:
                count = expected["count_ptr"].value
                found |= {"an empty expert"} if bool((count == 0).any()) else set()
                tokens = problem.instance.dims["T"]
                found |= {"all to one expert"} if int(count.max()) == tokens and tokens > 1 else set()
    return found


@pytest.mark.parametrize("spec", KERNELS.values(), ids=lambda s: s.name)
def test_edges_are_reached(spec: KernelSpec) -> None:
    found = edges_of(spec)
    assert not wanted(spec) - found, f"no case of {spec.name} has {', '.join(sorted(wanted(spec) - found))}"


EDGES = ("one row", "an empty expert", "all to one expert", "ragged lengths", "length 1", "length 4097", "zeros",
         "subnormals")  # fmt: skip


def table() -> str:
    """Markdown: kernels by edges; x where a case reaches it, a dash where the kernel has no such argument."""
    lines = [f"| kernel | cases | {' | '.join(EDGES)} |", "|" + "---|" * (2 + len(EDGES))]
    for spec in KERNELS.values():
        found, asked = edges_of(spec), wanted(spec)
        cells = ["x" if edge in found else "MISSING" if edge in asked else "-" for edge in EDGES]
        lines.append(f"| {spec.name} | {len(spec.cases)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
