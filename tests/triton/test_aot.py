"""Compilation without a GPU: what comes out, that it is the same every time, its cache and its checks."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from generated import program

from moec.codegen.triton import aot, cache
from moec.codegen.triton.arch import ARCHITECTURES, architecture
from moec.codegen.triton.errors import (
    CheckFailed,
    CompileFailed,
    UnknownArchitecture,
    UnknownKernel,
    UnknownShapeClass,
    UnmetRequirement,
    UnsupportedKernel,
)
from moec.codegen.triton.facts import problems
from moec.codegen.triton.fused.groups import PRODUCTS, ROWS
from moec.codegen.triton.spec import Instance, Tile, instances, kernel, registry, serving, with_tile
from moec.ir import OPS


def product(bulk: bool = False, specialised: bool = False, recipe: str = "deepseek-v3", **sizes: int) -> Instance:
    """A generated linear layer for sm_90a, its operands by pointers or tensor descriptors."""
    entries = program("h800", recipe).table.entries
    base = next(e.instance for n, e in entries.items() if n.startswith("linear.decode"))
    depth = {} if recipe == "deepseek-v3" else {"BK": 64}
    constants = {"BM": 64, "BN": 64, **depth, "GROUP_M": 8, "TMA": int(bulk), "WS": int(specialised)}
    return replace(with_tile(base, Tile(constants, 4, 4)), dims={**base.dims, "K": 7168, **sizes})


def few() -> list[Instance]:
    return [
        product(),
        product(bulk=True),
        kernel("draw").instance("sm_90a"),
        kernel("heads_prefill").instance("sm_80"),
        kernel("cache_read").instance("sm_100a"),
        kernel("draw").instance("gfx942"),
        product(bulk=True, specialised=True),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def compiled(folder: Path) -> list[aot.Compiled]:
    return aot.compile_kernels(few(), folder=folder, jobs=1)


def test_binaries_and_instructions(compiled: list[aot.Compiled]) -> None:
    assert all(k.binary[:4] == b"\x7fELF" for k in compiled)
    found = {(k.instance.arch, k.instance.name): k.facts["tensor_instruction"] for k in compiled}
    assert found["sm_90a", "linear.decode"] == "wgmma"
    assert found["sm_80", "heads_prefill"] == "mma"
    assert found["sm_90a", "draw"] is None
    assert b"e4m3.e4m3" in compiled[0].assembly
    assert all(k.facts["registers"] > 0 and k.facts["threads"] >= 32 for k in compiled)


def test_forms_of_a_product(compiled: list[aot.Compiled]) -> None:
    """One source: the copy engine fetches tiles where descriptors are asked for, in warps of their own where those."""
    pointers, bulk, specialised = compiled[0], compiled[1], compiled[6]
    assert pointers.instance.spec.source == bulk.instance.spec.source == specialised.instance.spec.source
    assert [b"cp.async.bulk.tensor" in k.assembly for k in (pointers, bulk, specialised)] == [False, True, True]
    assert bulk.facts["registers"] < pointers.facts["registers"]
    assert specialised.facts["threads"] > bulk.facts["threads"] == pointers.facts["threads"] == 128
    assert all(k.problems() == [] and k.facts["spill_stores"] == 0 for k in (pointers, bulk, specialised))


def test_facts_agree_with_cuobjdump(compiled: list[aot.Compiled], tmp_path: Path) -> None:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for k in compiled[:4]:
        file = tmp_path / "kernel.cubin"
        file.write_bytes(k.binary)
        told = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
        assert f"Function {k.facts['symbol']}:" in told
        assert f"REG:{k.facts['registers']} " in told


def test_parameters_follow_the_signature(compiled: list[aot.Compiled]) -> None:
    """Every argument in order and two pointers at the end; a descriptor is a map, two sizes and two strides."""
    plain, descriptors = compiled[0], compiled[1]
    assert plain.facts["parameters"] == len(plain.instance.signature) + 2
    assert descriptors.facts["parameters"] == 8 + 2 * 5 + 2
    assert [m["box"] for m in descriptors.facts["tensor_maps"]] == [[64, 128], [64, 128]]


def test_second_time_from_cache(compiled: list[aot.Compiled], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a compiler was started")

    monkeypatch.setattr(aot.Worker, "start", refuse)
    again = aot.compile_kernels(few(), folder=folder)
    assert all(k.cached for k in again)
    assert [k.binary for k in again] == [k.binary for k in compiled]


def test_same_bytes_from_another_cache(compiled: list[aot.Compiled], tmp_path: Path) -> None:
    fresh = aot.compile_kernels(few()[:3], folder=tmp_path, jobs=2)
    assert not any(k.cached for k in fresh)
    assert [k.binary for k in fresh] == [k.binary for k in compiled[:3]]
    assert [k.assembly for k in fresh] == [k.assembly for k in compiled[:3]]
    assert [k.record() for k in fresh] == [k.record() for k in compiled[:3]]


def test_the_assembler_runs_at_fixed_addresses() -> None:
    """What a compiler process starts has no random addresses: ptxas for sm_100a gave two cubins in turns with them."""
    script = (
        "import subprocess; from moec.codegen.triton.compiler import fixed_addresses;"
        "print(fixed_addresses(), subprocess.check_output(['cat', '/proc/self/personality'], text=True))"
    )
    granted, child = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    if granted == "True":
        assert int(child, 16) & 0x0040000


def test_damaged_entry_is_made_again(compiled: list[aot.Compiled], folder: Path) -> None:
    reading = few()[4]
    entry = cache.place(folder, aot.request_of(reading)["key"])
    for damage in (b"", b"\x7fELF but not all of it"):
        (entry / "binary").write_bytes(damage)
        mended = aot.compile_kernels([reading], folder=folder)[0]
        assert not mended.cached
        assert mended.binary == compiled[4].binary


def test_many_writers_of_one_entry(tmp_path: Path) -> None:
    files = {"binary": b"1" * 100_000, "assembly": b"2"}
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(cache.store, tmp_path, "ab12", {"n": 1}, files) for _ in range(40)]:
            done.result()
    found = cache.load(tmp_path, "ab12")
    assert found is not None
    assert found[1] == files
    assert [p.name for p in cache.place(tmp_path, "ab12").parent.iterdir()] == ["ab12"]


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    assert cache.default_folder() == tmp_path / "gpu-kernels"
    monkeypatch.delenv("MOEC_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "moec" / "gpu-kernels"


def test_key_follows_what_decides_the_result() -> None:
    base = product()
    others = [
        product(bulk=True),
        replace(base, arch="sm_100a"),
        product(K=7168 + 16),
        replace(base, types={"c0_ptr": "*fp32"}),
        replace(base, tile=replace(base.tile, num_stages=2)),
    ]
    keys = [aot.request_of(i)["key"] for i in (base, *others)]
    assert len(set(keys)) == len(keys)
    # Rows are a run-time argument: no number of them needs a kernel of its own.
    assert aot.request_of(product(ROWS=9))["key"] == keys[0]


def test_written_folder(compiled: list[aot.Compiled], tmp_path: Path) -> None:
    kernels = [compiled[0], compiled[2], compiled[4]]
    aot.write(kernels, tmp_path)
    records = json.loads((tmp_path / "kernels.json").read_text())
    fields = ("name", "ops", "cubin", "ptx", "registers", "spill_stores", "spills_listed", "shared_bytes")
    for record, k in zip(records, kernels, strict=True):
        assert all(field in record for field in (*fields, "tensor_instruction"))
        assert (tmp_path / record["cubin"]).read_bytes() == k.binary
        assert (tmp_path / record["ptx"]).read_bytes() == k.assembly
        assert cache.digest(k.binary) == record["launch"]["sha256"]
    source = (tmp_path / "sampling.py").read_text()
    assert source.startswith("# draw.sm_90a: sample.draw; 8 warps, 1 stages; BLOCK=2048")
    assert source.endswith((aot.KERNELS / "sampling.py").read_text())
    assert (tmp_path / "linear.py").read_text().startswith("# linear.decode.sm_90a: linear; 4 warps, 4 stages; ")
    assert (tmp_path / "common.py").exists() and (tmp_path / "products.py").exists()


GOOD = {"tensor_instruction": "wgmma", "spill_stores": 0, "shared_bytes": 1024, "serialised": False}
GOOD |= {"registers": 168, "threads": 384, "parameters": 7}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"tensor_instruction": "mma"}, "wgmma expected, mma found"),
        ({"tensor_instruction": None}, "wgmma expected, no tensor instruction found"),
        ({"spill_stores": 16}, "16 bytes of spill stores, 8 listed"),
        ({"spill_stores": 8}, ""),
        ({"shared_bytes": 227 * 1024 + 1}, "shared memory, 232448 are there"),
        ({"registers": 255}, "98304 registers for a block, 65536 are there"),
        ({"parameters": 6}, "6 parameters, the signature makes 7"),
        ({"serialised": True}, "ptxas serialises its wgmma"),
    ],
)
def test_checks(change: dict[str, Any], said: str) -> None:
    found = "; ".join(problems({**GOOD, **change}, architecture("sm_90a"), True, 8, 7))
    assert said in found
    assert bool(said) == bool(found)


def test_bad_tile_fails_its_check(folder: Path) -> None:
    """16 rows are too few for wgmma: the kernel compiles to mma, and the check says so."""
    wide = product(recipe="bf16")
    narrow = with_tile(wide, replace(wide.tile, constants={**wide.tile.constants, "BM": 16}))
    with pytest.raises(CheckFailed, match=r"'linear\.decode' for sm_90a fails its checks: wgmma expected, mma found"):
        aot.compile_kernels([narrow], folder=folder)


def test_kernel_that_does_not_compile(folder: Path) -> None:
    odd = replace(kernel("draw").instance("sm_90a"), tile=Tile({"BLOCK": 1000}))
    with pytest.raises(CompileFailed, match=r"'draw' does not compile for sm_90a: .*power of 2") as caught:
        aot.compile_kernels([odd], folder=folder)
    assert "\n" not in str(caught.value)


def test_wrong_use_is_one_line() -> None:
    with pytest.raises(
        UnsupportedKernel, match=r"'permute_fp8' does not run on sm_80: it needs FP8 .*; use 'permute' there"
    ):
        kernel("permute_fp8").instance("sm_80")
    with pytest.raises(UnknownArchitecture, match=r"'sm_90' .*did you mean sm_90a"):
        instances("sm_90")
    with pytest.raises(UnknownKernel, match=r"'drow' .*did you mean draw"):
        kernel("drow")
    with pytest.raises(UnknownShapeClass, match=r"'decod' on sm_90a \(did you mean decode\?\)"):
        product().spec.instance("sm_90a", "decod")
    with pytest.raises(UnmetRequirement, match=r"needs 'D % 8 == 0', which does not hold for {'D': 60}"):
        kernel("heads_prefill").instance("sm_90a", D=60)


def test_every_fallback_runs_where_it_is_needed() -> None:
    for spec in registry().values():
        for arch in set(ARCHITECTURES) - set(spec.tiles):
            if spec.fallback:
                chain = kernel(spec.fallback)
                while arch not in chain.tiles and chain.fallback:
                    chain = kernel(chain.fallback)
                assert arch in chain.tiles, (spec.name, arch)
                assert set(chain.ops) & set(spec.ops), (spec.name, chain.name)


# What a device does without a kernel: views, control flow, and what is done once when weights are packed.
CONTROL = {"split", "unflatten", "flatten", "repeat", "call", "index.affine", "event.record", "event.wait"}
"""Views are read through, and the others steer launches."""
LACKING = {
    *ROWS, *PRODUCTS,
    *(name for name in OPS if name.startswith("comm.") and name != "comm.dispatch"),
} - {"moe.combine", "moe.experts"}  # fmt: skip
"""Ops without a kernel declared by hand: those that are generated, and what is refused by name (exchanges)."""


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_ops_without_a_kernel_are_those_we_know(arch: str) -> None:
    computed = {name for name in OPS if not name.startswith("weight.")} - CONTROL
    if not architecture(arch).fp8:
        computed -= {"quant.cast"}
    assert {op for op in computed if not serving(op, arch)} == LACKING & computed


def test_kernels_name_ops_of_the_ir() -> None:
    """Or the choice of the next token, which the IR leaves to the run time."""
    known = {*OPS, "sample.draw"}
    assert not [(s.name, op) for s in registry().values() for op in s.ops if op not in known]


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_all_kernels_compile_and_pass(arch: str, folder: Path) -> None:
    results = aot.compile_kernels(instances(arch), folder=folder)
    names = [k.instance.name for k in results]
    assert len(set(names)) == len(names)
