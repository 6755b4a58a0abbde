"""Launching packed kernels: argument packing and every error, with a stand-in for the driver library.

What a real driver does with the packed bytes needs a GPU: `benchmarks/gpu.py` checks it there.
"""

from __future__ import annotations

import ctypes
import gc
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from moec.runtime.cuda import Driver, Kernel, load_kernels
from moec.runtime.cuda.arguments import AlignedBytes, Matrix, pack
from moec.runtime.cuda.errors import (
    BadArguments,
    CubinTooNew,
    DamagedKernel,
    DriverFailed,
    DriverTooOld,
    NoDevice,
    NoDriver,
    NoHostMemory,
    OutOfMemory,
    OutOfMemoryIn,
    WrongArchitecture,
)
from moec.runtime.cuda.kernel import runs_on


class FakeLibrary:
    """A driver library of one 9.0 device whose calls return what a test sets, and which notes them."""

    def __init__(self, *, version: int = 12080, devices: int = 1, **statuses: int) -> None:
        self.version, self.devices, self.statuses = version, devices, statuses
        self.calls: list[tuple[Any, ...]] = []

    def cuGetErrorName(self, status: int, out: Any) -> int:
        out._obj.value = b"CUDA_ERROR_%d" % status
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = self.devices
        return 0

    def cuDeviceGetAttribute(self, out: Any, number: int, device: Any) -> int:
        out._obj.value = {75: 9, 76: 0}[number]
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = 1000, 8000
        return 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            return self.statuses.get(name, 0)

        return call


RECORD = {
    "name": "embedding", "cubin": "embedding.cubin", "shared_bytes": 0,
    "launch": {
        "arch": "sm_90a", "symbol": "embedding", "threads": 128, "global_scratch": 0, "tensor_maps": [],
        "parameters": [["ids_ptr", "*i32", True], ["D", "i32", True], ["eps", "fp32", False]],
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    },
}  # fmt: skip
ARGUMENTS = {"ids_ptr": 4096, "D": 7168, "eps": 1e-6}


def changed(**launch: Any) -> dict[str, Any]:
    return {**RECORD, "launch": {**RECORD["launch"], **launch}}  # type: ignore[dict-item]


def no_maps(meta: Any, matrix: Matrix) -> AlignedBytes:
    raise AssertionError("no descriptor here")


def at(address: int, form: str) -> Any:
    return struct.unpack(form, ctypes.string_at(address, struct.calcsize(form)))[0]


def test_packing_follows_the_signature() -> None:
    packed = pack("k", RECORD["launch"]["parameters"], [], ARGUMENTS, no_maps, scratch=77)  # type: ignore[index]
    values = [at(a, f) for a, f in zip(packed.addresses, ("Q", "i", "f", "Q", "Q"), strict=True)]
    assert values == [4096, 7168, pytest.approx(1e-6), 77, 0]
    assert list(packed.array()) == packed.addresses


def test_packing_a_descriptor() -> None:
    """A 128-byte aligned map of 128 bytes, then sizes as i32 and strides as i64."""
    made: list[tuple[Any, Matrix]] = []

    def encode(meta: Any, matrix: Matrix) -> AlignedBytes:
        made.append((meta, matrix))
        return AlignedBytes()

    matrix = Matrix(1 << 40, (300, 7168), (7168, 1))
    kinds = [["a_desc", "tensordesc<fp8e4nv[64, 128]>", False], ["M", "i32", False]]
    packed = pack("k", kinds, [{"box": [64, 128]}], {"a_desc": matrix, "M": 300}, encode)
    assert made == [({"box": [64, 128]}, matrix)]
    assert packed.addresses[0] % 128 == 0
    forms = ("i", "i", "q", "q", "i", "Q", "Q")
    assert [at(a, f) for a, f in zip(packed.addresses[1:], forms, strict=True)] == [300, 7168, 7168, 1, 300, 0, 0]


def test_tensor_map_is_encoded_fastest_dim_first() -> None:
    library = FakeLibrary()
    meta = {"box": [64, 128], "element_bytes": 2, "data_type": 9, "swizzle": 3}
    Driver(library=library).encode(meta, Matrix(256, (300, 512), (520, 1)))
    call = next(c for c in library.calls if c[0] == "cuTensorMapEncodeTiled")
    _, _, data_type, rank, address, sizes, strides, box, steps, interleave, swizzle, _, fill = call
    assert (data_type, rank.value, address.value, interleave, swizzle, fill) == (9, 2, 256, 0, 3, 0)
    assert (list(sizes), list(strides), list(box), list(steps)) == ([512, 300], [1040], [128, 64], [1, 1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"D": 7170}, "'D' = 7170 must be a multiple of 16"),
        ({"D": 1 << 31}, "'D' = 2147483648 does not fit i32"),
        ({"D": 16.0}, "'D' must be an integer, not float"),
        ({"ids_ptr": 4100}, "'ids_ptr' must lie at a multiple of 16 bytes, it lies at 0x1004"),
        ({"ids_ptr": "x"}, "'ids_ptr' must be a device address, not str"),
        ({"eps": None}, "'eps' must be a number, not NoneType"),
        ({"more": 1}, "arguments unknown more"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadArguments) as caught:
        pack("k", RECORD["launch"]["parameters"], [], {**ARGUMENTS, **change}, no_maps)  # type: ignore[index]
    assert str(caught.value) == f"kernel 'k': {said}"


def test_missing_argument() -> None:
    with pytest.raises(BadArguments, match="arguments missing D, eps"):
        pack("k", RECORD["launch"]["parameters"], [], {"ids_ptr": 0}, no_maps)  # type: ignore[index]


def test_launch_passes_grid_threads_and_shared_memory() -> None:
    library = FakeLibrary()
    record = {**RECORD, "shared_bytes": 100_000}
    Kernel(Driver(library=library), record, b"").launch((5, 7), ARGUMENTS, stream=9)
    assert [c[2:] for c in library.calls if c[0] == "cuFuncSetAttribute"] == [(8, 100_000)]
    launched = next(c for c in library.calls if c[0] == "cuLaunchKernel")
    assert launched[2:9] == (5, 7, 1, 128, 1, 1, 100_000)
    assert launched[9].value == 9


def test_empty_grid_launches_nothing() -> None:
    library = FakeLibrary()
    Kernel(Driver(library=library), RECORD, b"").launch((0,), ARGUMENTS)
    assert not [c for c in library.calls if c[0] == "cuLaunchKernel"]


def test_a_rank_that_no_row_comes_to() -> None:
    """A matrix without rows has no tensor map: the driver would refuse it."""
    library = FakeLibrary(cuTensorMapEncodeTiled=1)
    meta = {"box": [64, 128], "element_bytes": 1, "data_type": 0, "swizzle": 3}
    record = changed(parameters=[["a_ptr", "tensordesc<fp8e4nv[64, 128]>", False]], tensor_maps=[meta])
    kernel = Kernel(Driver(library=library), record, b"")
    kernel.launch((0, 4), {"a_ptr": Matrix(4096, (0, 256), (256, 1))})
    assert not [c for c in library.calls if c[0] in ("cuLaunchKernel", "cuTensorMapEncodeTiled")]
    with pytest.raises(DriverFailed, match="cuTensorMapEncodeTiled failed"):
        kernel.launch((1, 4), {"a_ptr": Matrix(4096, (0, 256), (256, 1))})


def test_parameters_live_as_long_as_the_launch() -> None:
    """What the array points to is not freed between packing and launching."""
    library = FakeLibrary()
    start = Kernel(Driver(library=library), RECORD, b"").bound((1,), ARGUMENTS)
    gc.collect()
    noise = [ctypes.c_uint64(1 << 63) for _ in range(1000)]
    start(0)
    array = next(c for c in library.calls if c[0] == "cuLaunchKernel")[10]
    assert [at(a, f) for a, f in zip(array, "QifQQ", strict=True)] == [4096, 7168, pytest.approx(1e-6), 0, 0] and noise


@pytest.mark.parametrize(
    ("library", "error", "said"),
    [
        (FakeLibrary(cuInit=100), NoDriver, "no CUDA driver here (CUDA_ERROR_100)"),
        (FakeLibrary(version=11080), DriverTooOld, "it speaks CUDA 11.8, the kernels need 12.0"),
        (FakeLibrary(devices=0), NoDevice, "no CUDA device 0: 0 found"),
        (
            FakeLibrary(cuDevicePrimaryCtxRetain=999),
            DriverFailed,
            "cuDevicePrimaryCtxRetain failed with CUDA_ERROR_999",
        ),
    ],
)
def test_machine_that_cannot(library: Any, error: Any, said: str) -> None:
    with pytest.raises(error) as caught:
        Driver(library=library)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(NoDriver, match=r"no CUDA driver here \(libcuda\.so\.1 not found\): run on a machine"):
        Driver()


@pytest.mark.parametrize(
    ("library", "record", "error", "said"),
    [
        (FakeLibrary(), changed(arch="sm_100a"), WrongArchitecture, "is built for sm_100a, this device is sm_90"),
        (FakeLibrary(), changed(arch="gfx942"), WrongArchitecture, "is built for gfx942, this device is sm_90"),
        (FakeLibrary(cuModuleLoadData=209), RECORD, WrongArchitecture, "compile again with a target of its kind"),
        (FakeLibrary(cuModuleLoadData=200), RECORD, CubinTooNew, "this CUDA driver (12.8) does not read its cubin"),
        (FakeLibrary(cuModuleLoadData=700), RECORD, DriverFailed, "of 'embedding' failed with CUDA_ERROR_700"),
        (
            FakeLibrary(cuModuleLoadData=2),
            RECORD,
            OutOfMemoryIn,
            "cuModuleLoadData of 'embedding' needs more than the 1000 of 8000 bytes that are free",
        ),
        (FakeLibrary(), changed(sha256="0"), DamagedKernel, "does not match its hash; write the artifact again"),
    ],
)
def test_kernel_that_cannot_be_loaded(library: Any, record: dict[str, Any], error: Any, said: str) -> None:
    with pytest.raises(error) as caught:
        Kernel(Driver(library=library), record, b"")
    assert said in str(caught.value)


def test_a_grid_that_no_device_takes() -> None:
    kernel = Kernel(Driver(library=FakeLibrary()), RECORD, b"")
    with pytest.raises(BadArguments, match=r"grid \(1, 65536\) is larger than a device takes"):
        kernel.launch((1, 65536), ARGUMENTS)


def test_no_page_locked_memory() -> None:
    with pytest.raises(NoHostMemory, match="gives no 5000 bytes of page-locked memory"):
        Driver(library=FakeLibrary(cuMemAllocHost_v2=2)).host_memory(5000)


def test_memory_that_ends_in_a_later_call_is_said() -> None:
    with pytest.raises(OutOfMemoryIn, match="not enough GPU memory: cuStreamCreate needs more than the 1000 of 8000"):
        Driver(library=FakeLibrary(cuStreamCreate=2)).stream()


def test_not_enough_memory() -> None:
    with pytest.raises(OutOfMemory, match="for the cache: 5000 bytes wanted, 1000 of 8000 free"):
        Driver(library=FakeLibrary(cuMemAlloc_v2=2)).allocate(5000, "the cache")


@pytest.mark.parametrize(
    ("arch", "capability", "fits"),
    [
        ("sm_90a", (9, 0), True), ("sm_90a", (10, 0), False), ("sm_100a", (10, 0), True), ("sm_100a", (10, 3), False),
        ("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_80", (9, 0), False), ("sm_89", (8, 6), False),
    ],
)  # fmt: skip
def test_where_a_cubin_runs(arch: str, capability: tuple[int, int], fits: bool) -> None:
    assert runs_on(arch, capability) is fits


def test_folder_of_kernels(tmp_path: Path) -> None:
    driver = Driver(library=FakeLibrary())
    with pytest.raises(DamagedKernel, match=r"kernels\.json is missing"):
        load_kernels(tmp_path, driver)
    (tmp_path / "kernels.json").write_text("[{}]")
    with pytest.raises(DamagedKernel, match=r"kernels\.json is not what was written"):
        load_kernels(tmp_path, driver)
    (tmp_path / "kernels.json").write_text(json.dumps([RECORD]))
    with pytest.raises(DamagedKernel, match=r"embedding\.cubin is missing"):
        load_kernels(tmp_path, driver)
    (tmp_path / "embedding.cubin").write_bytes(b"")
    assert set(load_kernels(tmp_path, driver)) == {"embedding"}
